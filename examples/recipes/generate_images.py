"""Images of a text-to-image run, one per seed, to be compared side by side as in the paper's figure 3.

python examples/recipes/generate_images.py outputs/text_to_image --prompt "a 3d icon of a bird"
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from peft import PeftModel

import settings


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder that train.py has written")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--seeds", type=int, default=5, help="how many images")
    parser.add_argument("--steps", type=int, default=50, help="diffusion steps")
    options = parser.parse_args(arguments)

    recipe = settings.saved(options.run)
    pipeline = StableDiffusionXLPipeline.from_pretrained(recipe["model"], dtype=settings.dtype(recipe))
    pipeline.unet = PeftModel.from_pretrained(pipeline.unet, options.run).merge_and_unload()
    pipeline.to(settings.processes().device)
    side = recipe["data"]["resolution"]
    for seed in range(options.seeds):
        image = pipeline(
            options.prompt,
            height=side,
            width=side,
            num_inference_steps=options.steps,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        image.save(options.run / f"seed-{seed}.png")


if __name__ == "__main__":
    main()
