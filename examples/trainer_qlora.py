"""QLoRA with Flat-LoRA in TRL's SFTTrainer: 4-bit model, peft_config, callback; save, load, resume.

python examples/trainer_qlora.py                      # a tiny untrained model, on any machine
python examples/trainer_qlora.py --resume --steps 90  # goes on from its last checkpoint
python examples/trainer_qlora.py --model Qwen/Qwen3-0.6B --dataset trl-lib/Capybara --steps 500 --lr 2e-4
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from trl import SFTConfig, SFTTrainer

from flatlora_optim.integrations.transformers import FlatLoRACallback

WORDS = [f"{number}" for number in range(32)]


def tiny_model(folder: Path) -> str:
    """Stands in for a model of the hub: an untrained Llama with 32 words."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>").save_pretrained(
        folder
    )
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(vocabulary), initializer_range=0.1)).save_pretrained(
        folder
    )
    return str(folder)


def counting() -> Dataset:
    """Numbers that go up by a fixed stride."""
    rows = [
        [WORDS[(start + i * stride) % 32] for i in range(12)] for start in range(32) for stride in (1, 2, 3)
    ]
    return Dataset.from_dict({"text": [" ".join(row) for row in rows]})


def main(args: argparse.Namespace) -> None:
    name = args.model or tiny_model(args.output / "model")
    data = load_dataset(args.dataset, split="train") if args.dataset else counting()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(name, quantization_config=four_bit, dtype=dtype),
        args=SFTConfig(
            output_dir=str(args.output),
            max_steps=args.steps,
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            logging_steps=max(1, args.steps // 10),
            save_steps=max(1, args.steps // 2),
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
        ),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(name),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[FlatLoRACallback(sigma=args.sigma)],  # the one line
    )
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.save_model(str(args.output / "adapter"))

    # The adapter is an ordinary one, and the base model is what it was.
    model = AutoPeftModelForCausalLM.from_pretrained(
        args.output / "adapter", quantization_config=four_bit, dtype=dtype
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    batch = {name: value.to(model.device) for name, value in batch.items()}
    with torch.no_grad():
        loss = model.eval()(**batch).loss
    print(f"Result: loss {loss:.3f} after {args.steps} steps; the adapter is in {args.output}/adapter")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a causal language model of the hub, or a folder")
    parser.add_argument("--dataset", help='of the hub, with "text", "messages" or "prompt" and "completion"')
    parser.add_argument("--output", type=Path, default=Path("outputs/trainer_qlora"))
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument(
        "--lr", type=float, default=5e-3, help="learning rate; 2e-4 is usual for large models"
    )
    parser.add_argument("--sigma", type=float, default=0.05, help="strength of the noise")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    main(parser.parse_args())
