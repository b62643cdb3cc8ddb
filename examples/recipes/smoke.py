"""The ``--smoke`` variant: a recipe whose model and data are tiny ones made here, on disk.

Only names and sizes of the recipe change. The tiny model has the architecture of the real one and
random weights; the rows have the columns of the real data set. Both are loaded as the real ones are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image as Picture
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from settings import Recipe, merge, processes

ROWS = 16
Row = dict[str, Any]


def shrink(recipe: Recipe, folder: Path) -> Recipe:
    """Writes a tiny model and a few rows to ``folder``, and returns the recipe that uses them."""
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    model, rows = folder / "model", folder / "data"
    state = processes()
    if state.is_main_process:
        torch.manual_seed(0)
        write_rows(recipe["data"], rows)
        MODELS[recipe["task"]](model)
    state.wait_for_everyone()
    steps = {"max_steps": 4} if "max_steps" in recipe["training"] else {"num_train_epochs": 1}
    smaller: Recipe = {
        "model": str(model),
        "data": {"path": str(rows), "subset": None, "rows": ROWS},
        "training": steps,
    }
    if recipe["batch_size"] > 1:
        smaller |= {"batch_size": 4, "micro_batch_size": 2}
    if "resolution" in recipe["data"]:
        smaller["data"]["resolution"] = 64
    return merge(recipe, smaller)


# ---------------------------------------------------------------------- rows

TEXT_ROWS: dict[str, Callable[[int], Row]] = {
    "meta-math/MetaMathQA": lambda i: {
        "type": "GSM_Rephrased",
        "query": f"Ann has {i} apples and buys 3. How many are there?",
        "original_question": f"Ann had {i} apples and bought 3. How many has she?",
        "response": f"{i} + 3 = {i + 3}\n#### {i + 3}\nThe answer is: {i + 3}",
    },
    "m-a-p/CodeFeedback-Filtered-Instruction": lambda i: {
        "query": f"Write a function that adds {i}.",
        "answer": f"Here it is:\n```python\ndef add(x):\n    return x + {i}\n```\nIt adds {i}.",
        "resource": "made up",
        "lang": "python",
    },
    "silk-road/Wizard-LM-Chinese-instruct-evol": lambda i: {
        "instruction": f"Count to {i}.",
        "output": ", ".join(map(str, range(i + 1))),
        "instruction_zh": f"数到 {i}。",
        "output_zh": str(i),
    },
    "yahma/alpaca-cleaned": lambda i: {
        "instruction": "Name the larger number.",
        "input": f"{i} and {i + 1}" if i % 2 else "",
        "output": str(i + 1),
    },
    "mnli": lambda i: {"premise": f"There are {i} cats.", "hypothesis": "There are cats.", "label": i % 3},
    "sst2": lambda i: {"sentence": f"film number {i} is fine", "label": i % 2},
    "cola": lambda i: {"sentence": f"They was {i}.", "label": i % 2},
    "qnli": lambda i: {"question": "How many?", "sentence": f"There are {i}.", "label": i % 2},
    "mrpc": lambda i: {"sentence1": f"He has {i}.", "sentence2": f"{i} are his.", "label": i % 2},
}


def write_rows(data: Row, folder: Path) -> None:
    """A data set of every split that the recipe names, with the real one's columns and features."""
    make = TEXT_ROWS.get(data["path"]) or TEXT_ROWS.get(data.get("subset", ""))
    rows = Dataset.from_list([make(i) for i in range(ROWS)]) if make else _image_rows(data)
    splits = {data["split"], data.get("eval_split", data["split"])}
    for split, part in DatasetDict(dict.fromkeys(splits, rows)).items():
        folder.mkdir(parents=True, exist_ok=True)
        # A name that datasets takes for this split, whatever the split is called.
        part.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def _image_rows(data: Row) -> Dataset:
    noise = np.random.default_rng(0)
    pictures = [Picture.fromarray(noise.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(ROWS)]
    if "label" not in data:
        columns = {data["image"]: pictures, "prompt": [f"a 3d icon of a cube, {i}" for i in range(ROWS)]}
        return Dataset.from_dict(columns, Features({data["image"]: Image(), "prompt": Value("string")}))
    columns = {data["image"]: pictures, data["label"]: [i % 4 for i in range(ROWS)]}
    label = ClassLabel(names=["red_cube", "blue_ball", "green_cone", "old_car"])
    return Dataset.from_dict(columns, Features({data["image"]: Image(), data["label"]: label}))


# ---------------------------------------------------------------------- models


def _llama(folder: Path) -> None:
    tokenizer = _tokenizer("<s> $A", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    _write(folder, LlamaForCausalLM(config), tokenizer)


def _t5(folder: Path) -> None:
    tokenizer = _tokenizer("$A </s>", {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"})
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    _write(folder, T5ForConditionalGeneration(config), tokenizer)


def _clip(folder: Path) -> None:
    tokenizer = _clip_tokenizer(folder)
    text = _clip_text_config(tokenizer).to_dict()
    vision = _SMALL_TOWER | {"image_size": 32, "patch_size": 8, "projection_dim": 64}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_convert_rgb=True
    )
    _write(folder, CLIPModel(config), tokenizer, processor)


def _sdxl(folder: Path) -> None:
    tokenizer = _clip_tokenizer(folder / "vocabulary")
    text = _clip_text_config(tokenizer)
    blocks = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=blocks[0],
        up_block_types=blocks[1],
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=(2, 4),
        cross_attention_dim=2 * text.hidden_size,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + text.projection_dim,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        latent_channels=4,
        scaling_factor=0.13025,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        unet=unet,
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading"
        ),
    )
    pipeline.save_pretrained(folder)


MODELS = {"causal_lm": _llama, "seq2seq": _t5, "image_classification": _clip, "text_to_image": _sdxl}

_SMALL_TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def _write(folder: Path, *parts: Any) -> None:
    for part in parts:
        part.save_pretrained(folder)


def _tokenizer(template: str, special: dict[str, str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, learned from the rows above."""
    tokenizer = Tokenizer(models.BPE(unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=list(special.values()), initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator((str(make(i)) for make in TEXT_ROWS.values() for i in range(ROWS)), trainer)
    specials = [(token, tokenizer.token_to_id(token)) for token in special.values() if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer without merges: one token a character."""
    characters = pre_tokenizers.ByteLevel.alphabet()
    tokens = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=77)


def _clip_text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **_SMALL_TOWER,
    )
