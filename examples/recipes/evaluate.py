"""Runs the benchmark of a finished run, with the benchmark's own package.

python examples/recipes/evaluate.py outputs/math            # runs the recipe's `evaluate` commands
python examples/recipes/evaluate.py outputs/math --print    # only shows them
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

import settings
from settings import Recipe


def commands(run: Path) -> list[list[str]]:
    """The recipe's commands, with paths and names filled in."""
    recipe = settings.saved(run)
    python = shlex.quote(sys.executable)
    model = f"pretrained={recipe['model']},peft={run},tokenizer={run},dtype={recipe['dtype']}"
    values = {
        "python": python,
        "recipes": shlex.quote(str(settings.FOLDER)),
        "run": shlex.quote(str(run)),
        "name": recipe["name"],
        "lm_eval": f"{python} -m lm_eval --model hf --model_args {shlex.quote(model)} --batch_size 16 "
        f"--output_path {shlex.quote(str(run / 'results'))}",
    }
    return [shlex.split(command.format(**values)) for command in recipe["evaluate"]]


def write_lm_eval_task(recipe: Recipe, run: Path) -> None:
    """Describes a classification recipe to lm-eval, so that it asks what the training asked."""
    data = recipe["data"]
    task = {
        "task": recipe["name"],
        "dataset_path": data["path"],
        "dataset_name": data["subset"],
        "validation_split": data["eval_split"],
        "output_type": "multiple_choice",
        "doc_to_text": data["prompt"],
        "doc_to_target": "label",
        "doc_to_choice": data["choices"],
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (run / f"{recipe['name']}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder that train.py has written")
    parser.add_argument("--print", action="store_true", help="show the commands instead of running them")
    options = parser.parse_args(arguments)

    if "choices" in (recipe := settings.saved(options.run))["data"]:
        write_lm_eval_task(recipe, options.run)
    for command in commands(options.run):
        print(shlex.join(command), flush=True)
        if not options.print:
            # HumanEval executes what the model wrote; its task wants to be told so.
            subprocess.run(command, check=True, env=os.environ | {"HF_ALLOW_CODE_EVAL": "1"})


if __name__ == "__main__":
    main()
