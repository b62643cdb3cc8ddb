"""Language models: prompt in, response out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from datasets import Dataset
from peft import TaskType, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
)

from settings import Recipe, dtype, holds, processes, render

from . import Task, first, lora_config, read_rows

Row = dict[str, Any]
IGNORED = -100
"""The label of tokens that the loss leaves out."""


def build(recipe: Recipe) -> Task:
    if recipe["task"] == "causal_lm":
        return _build(recipe, AutoModelForCausalLM, TaskType.CAUSAL_LM, _continuation)
    return _build(recipe, AutoModelForSeq2SeqLM, TaskType.SEQ_2_SEQ_LM, _translation)


def _build(recipe: Recipe, auto_class: Any, task_type: TaskType, encode: Callable[[Row, Any], Row]) -> Task:
    tokenizer = AutoTokenizer.from_pretrained(recipe["model"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if "question" in recipe["data"]:
        tokenizer.chat_template = _chat_template(recipe["data"])
    model = auto_class.from_pretrained(recipe["model"], dtype=dtype(recipe), **_quantization(recipe))
    if recipe["quantize"]:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    adapted = get_peft_model(model, lora_config(recipe, task_type=task_type))
    rows = _encode_rows(recipe, partial(encode, tokenizer=tokenizer))
    return Task(adapted, adapted, rows, DataCollatorForSeq2Seq(tokenizer), tokenizer)


def _quantization(recipe: Recipe) -> dict[str, Any]:
    if not recipe["quantize"]:
        return {}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe["quantize"],
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype(recipe),
    )
    return {"quantization_config": config, "device_map": {"": processes().device}}


def _encode_rows(recipe: Recipe, encode: Callable[[Row], Row]) -> Dataset:
    data = recipe["data"]
    rows = read_rows(recipe)
    rows = rows.filter(lambda row: holds(data["keep"], row)).shuffle(seed=recipe["training"]["seed"])

    def tokenize(row: Row) -> Row:
        row = row | {"choices": data.get("choices")}
        return encode({"prompt": render(data["prompt"], row), "response": render(data["response"], row)})

    encoded = rows.map(tokenize, remove_columns=rows.column_names)
    fitting = encoded.filter(lambda row: len(row["input_ids"]) <= data["max_length"])
    return first(fitting, recipe)


def _continuation(row: Row, tokenizer: Any) -> Row:
    prompt = tokenizer(row["prompt"])["input_ids"]
    # Tokenized as one text, so that the seam is the one that generation will meet.
    tokens = tokenizer(row["prompt"] + row["response"])["input_ids"] + [tokenizer.eos_token_id]
    labels = [IGNORED] * len(prompt) + tokens[len(prompt) :]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


def _translation(row: Row, tokenizer: Any) -> Row:
    return {**tokenizer(row["prompt"]), "labels": tokenizer(text_target=row["response"])["input_ids"]}


def _chat_template(data: dict[str, Any]) -> str:
    """The recipe's prompt for programs that speak in messages (lm-eval, pipelines)."""
    user = f"{{% set {data['question']} = message['content'] %}}" + data["prompt"]
    assistant = "{{ message['content'] + eos_token }}"
    # No "{%-" after the prompt: it would eat the newline that ends it.
    return (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        f"{user}{{% else %}}{assistant}{{% endif %}}{{% endfor %}}"
    )
