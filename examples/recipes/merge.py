"""Merges a language model's adapters into its weights, for programs that don't know PEFT.

python examples/recipes/merge.py outputs/dialogue outputs/dialogue/alpaca-merged
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

import settings


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder that train.py has written")
    parser.add_argument("output", type=Path, help="where the merged model goes")
    options = parser.parse_args(arguments)

    dtype = settings.dtype(settings.saved(options.run))
    AutoPeftModelForCausalLM.from_pretrained(options.run, dtype=dtype).merge_and_unload().save_pretrained(
        options.output
    )
    AutoTokenizer.from_pretrained(options.run).save_pretrained(options.output)


if __name__ == "__main__":
    main()
