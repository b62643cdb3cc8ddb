"""Accuracy of an image classification run on its test set.

python examples/recipes/evaluate_images.py outputs/image-cifar10
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from peft import PeftModel
from sklearn.metrics import accuracy_score
from transformers import EvalPrediction, Trainer, TrainingArguments

import settings
from tasks import read_rows
from tasks.image_classification import ZeroShotClassifier, load_vision, make_head, with_pixels


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": accuracy_score(prediction.label_ids, prediction.predictions.argmax(-1))}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder that train.py has written")
    run = parser.parse_args(arguments).run

    recipe = settings.saved(run)
    rows = read_rows(recipe, "eval_split")
    vision = PeftModel.from_pretrained(load_vision(recipe), run)
    trainer = Trainer(
        ZeroShotClassifier(vision, make_head(recipe, rows)),
        TrainingArguments(
            output_dir=str(run / "results"),
            per_device_eval_batch_size=recipe["micro_batch_size"],
            remove_unused_columns=False,
            report_to="none",
        ),
        compute_metrics=accuracy,
    )
    results: dict[str, float] = trainer.evaluate(with_pixels(recipe, rows))
    (run / "results.json").write_text(json.dumps(results, indent=2))
    print(results)
    return results


if __name__ == "__main__":
    main()
