"""SmolLM2 learns sums; the shift: longer sums, and larger numbers."""

from __future__ import annotations

import random
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .population import Examples
from .tasks import Split, Task, packages


class LastLayers(nn.Module):
    """The upper layers of a Llama, and of its vocabulary only what answers are made of."""

    def __init__(self, model: nn.Module, first: int, vocabulary: Tensor) -> None:
        super().__init__()
        self.layers = model.model.layers[first:]
        self.norm, self.rotary = model.model.norm, model.model.rotary_emb
        self.register_buffer("vocabulary", model.lm_head.weight.detach()[vocabulary])

    def forward(self, states: Tensor, labels: Tensor) -> Tensor:
        """Logits of the labels' positions. Padding is on the right, where no token looks."""
        positions = torch.arange(states.shape[1], device=states.device)[None]
        embedded = self.rotary(states, positions)
        for layer in self.layers:
            states = layer(states, position_ids=positions, position_embeddings=embedded)
            states = states[0] if isinstance(states, tuple) else states
        answers = states.gather(1, labels[..., None].expand(-1, -1, states.shape[-1]))
        return F.linear(self.norm(answers), self.vocabulary)


class Arithmetic(Task):
    """Sums of two or three digits from few examples, of which some have wrong answers.

    An answer counts if each of its tokens, and its end, is the most likely one given those before it:
    then greedy decoding gives it. The choice is among the tokens that answers are made of. A wrong answer is
    off by one to nine.
    """

    in_domain = "three terms"
    out_of_domain = ("four terms", "two digits")
    # Least and most terms, and digits.
    SIZES: ClassVar = {"three terms": (2, 3, 1), "four terms": (4, 4, 1), "two digits": (2, 2, 2)}
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    rank, classes = 8, 13
    adapted = 4
    """How many of the last layers carry adapters; what is below is computed once."""
    TESTS, POOL = 400, 2000
    ANSWER = 6  # tokens of an answer with sign, digits and end, at most

    @cached_property
    def _loaded(self) -> tuple[nn.Module, Any]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        gguf = packages.smollm2()
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        return model.eval().requires_grad_(False), tokenizer

    @cached_property
    def _vocabulary(self) -> Tensor:
        _, tokenizer = self._loaded
        ids = {token for text in (" 0", " -1", "23456789") for token in tokenizer(text)["input_ids"]}
        return torch.tensor([*sorted(ids), tokenizer.eos_token_id])

    @cached_property
    def _top(self) -> nn.Module:
        model, _ = self._loaded
        return LastLayers(model, len(model.model.layers) - self.adapted, self._vocabulary)

    def model(self) -> nn.Module:
        return self._top

    @cached_property
    def _sums(self) -> dict[str, list[tuple[str, int]]]:
        """No sum of a test is in the pool."""
        import reasoning_gym

        def make(terms: int, most: int, digits: int, count: int, seed: int) -> list[tuple[str, int]]:
            made = reasoning_gym.create_dataset(
                "chain_sum",
                min_terms=terms, max_terms=most, min_digits=digits, max_digits=digits,
                size=4 * count, seed=seed,
            )  # fmt: skip
            sums = {item["metadata"]["expression"]: int(item["answer"]) for item in made}
            return list(sums.items())[:count]

        sums = {name: make(*size, self.TESTS, 2) for name, size in self.SIZES.items()}
        tested = {expression for expression, _ in sums[self.in_domain]}
        pool = make(*self.SIZES[self.in_domain], self.POOL + self.TESTS, 0)
        return sums | {"pool": [item for item in pool if item[0] not in tested][: self.POOL]}

    @torch.no_grad()
    def _examples(self, sums: list[tuple[str, int]]) -> Examples:
        model, tokenizer = self._loaded
        below = model.model.layers[: len(model.model.layers) - self.adapted]
        rows, places, labels = [], [], []
        known = {token: i for i, token in enumerate(self._vocabulary.tolist())}
        for expression, result in sums:
            question = tokenizer(f"{expression} =")["input_ids"]
            answer = [*tokenizer(f" {result}")["input_ids"], tokenizer.eos_token_id]
            rows.append(question + answer)
            missing = self.ANSWER - len(answer)
            # An answer's token is predicted at the one before; what is missing repeats the last place.
            place = [len(question) - 1 + i for i in range(len(answer))]
            places.append(place + place[-1:] * missing)
            labels.append([known[token] for token in answer] + [-100] * missing)
        length = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.eos_token_id] * (length - len(row)) for row in rows])
        states = []
        for part in ids.split(100):
            x = model.model.embed_tokens(part)
            positions = torch.arange(length)[None]
            embedded = model.model.rotary_emb(x, positions)
            for layer in below:
                x = layer(x, position_ids=positions, position_embeddings=embedded)
                x = x[0] if isinstance(x, tuple) else x
            states.append(x)
        return Examples((torch.cat(states), torch.tensor(places)), torch.tensor(labels))

    @cached_property
    def pool(self) -> Examples:
        """Each sum with its right answer, then each with a wrong one."""
        generator = random.Random(0)
        right = self._sums["pool"]
        wrong = [
            (text, result + generator.choice((-1, 1)) * generator.randint(1, 9)) for text, result in right
        ]
        return self._examples(right + wrong)

    def split(self, seed: int, train: int, validation: int, wrong: float) -> Split:
        generator = torch.Generator().manual_seed(seed)
        count = len(self.pool) // 2
        order = torch.randperm(count, generator=generator)
        parts = []
        for index in (order[:train], order[train : train + validation]):
            at = torch.randperm(len(index), generator=generator)[: round(wrong * len(index))]
            parts.append(
                self.pool.take(index.index_add(0, at, torch.full((len(at),), count))).to(self.device)
            )
        return Split(*parts)

    @cached_property
    def tests(self) -> dict[str, Examples]:
        return {name: self._examples(self._sums[name]) for name in self.SIZES}


class FullArithmetic(Arithmetic):
    """With adapters on all layers: for a GPU."""

    adapted = 30
    at_once = 8
