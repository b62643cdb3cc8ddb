"""SmolLM2-135M learns to answer: whether a review is positive (on a CPU), and sums (on a GPU)."""

from __future__ import annotations

import random
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .population import Examples
from .tasks import Split, Task, packages, rated_sentences


class LastLayers(nn.Module):
    """The upper layers of a Llama, and of its vocabulary only what answers are made of."""

    def __init__(self, model: nn.Module, first: int, vocabulary: Tensor) -> None:
        super().__init__()
        self.layers = model.model.layers[first:]
        self.norm, self.rotary = model.model.norm, model.model.rotary_emb
        self.register_buffer("vocabulary", model.lm_head.weight.detach()[vocabulary])

    def forward(self, states: Tensor, places: Tensor) -> Tensor:
        """Logits at one or several places of each row. Padding is on the right, where no token looks."""
        positions = torch.arange(states.shape[1], device=states.device)[None]
        embedded = self.rotary(states, positions)
        for layer in self.layers:
            states = layer(states, position_ids=positions, position_embeddings=embedded)
            states = states[0] if isinstance(states, tuple) else states
        index = places.view(len(states), -1, 1).expand(-1, -1, states.shape[-1])
        answers = self.norm(states.gather(1, index)).view(*places.shape, -1)
        return F.linear(answers, self.vocabulary)


class LanguageTask(Task):
    """SmolLM2 with adapters on its last layers; what is below is computed once."""

    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    rank = 8
    flatness_examples = 25
    adapted = 2
    """How many of the 30 layers carry adapters."""

    @cached_property
    def _loaded(self) -> tuple[nn.Module, Any]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        gguf = packages.smollm2()
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        return model.eval().requires_grad_(False), tokenizer

    @cached_property
    def _vocabulary(self) -> Tensor:
        """The tokens that answers are made of."""
        raise NotImplementedError

    @cached_property
    def _top(self) -> nn.Module:
        model, _ = self._loaded
        return LastLayers(model, len(model.model.layers) - self.adapted, self._vocabulary)

    def model(self) -> nn.Module:
        return self._top

    @torch.no_grad()
    def _states(self, rows: list[list[int]]) -> Tensor:
        """What the lower layers make of these tokens, padded on the right."""
        model, tokenizer = self._loaded
        below = model.model.layers[: len(model.model.layers) - self.adapted]
        length = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.eos_token_id] * (length - len(row)) for row in rows])
        positions = torch.arange(length)[None]
        states = []
        for part in ids.split(100):
            x = model.model.embed_tokens(part)
            embedded = model.model.rotary_emb(x, positions)
            for layer in below:
                x = layer(x, position_ids=positions, position_embeddings=embedded)
                x = x[0] if isinstance(x, tuple) else x
            states.append(x)
        return torch.cat(states)


class Reviews(LanguageTask):
    """It continues "Review: ... Sentiment:" by " positive" or " negative"; tested on other domains, too."""

    in_domain = "movies"
    out_of_domain = ("Amazon", "NYT", "tweets")
    LONGEST, TESTS, POOL = 24, 200, 1500

    @cached_property
    def _vocabulary(self) -> Tensor:
        _, tokenizer = self._loaded
        return torch.tensor([tokenizer(word)["input_ids"][0] for word in (" negative", " positive")])

    def _read(self, domain: str, start: int, count: int) -> Examples:
        _, tokenizer = self._loaded
        before, after = (tokenizer(text)["input_ids"] for text in ("Review: ", "\nSentiment:"))
        rated = rated_sentences(domain)[start : start + count]
        rows = [before + tokenizer(text)["input_ids"][: self.LONGEST] + after for text, _ in rated]
        places = torch.tensor([len(row) - 1 for row in rows])
        return Examples((self._states(rows), places), torch.tensor([int(r > 0) for _, r in rated]))

    @cached_property
    def pool(self) -> Examples:
        return self._read("movies", self.TESTS, self.POOL)

    @cached_property
    def tests(self) -> dict[str, Examples]:
        return {name: self._read(name, 0, self.TESTS) for name in (self.in_domain, *self.out_of_domain)}


class Arithmetic(LanguageTask):
    """Sums of two or three digits, some of the examples with wrong answers; adapters on all layers.

    An answer counts if each of its tokens, and its end, is the most likely one given those before it:
    then greedy decoding gives it. The choice is among the tokens that answers are made of. A wrong answer is
    off by one to nine.
    """

    in_domain = "three terms"
    out_of_domain = ("four terms", "two digits")
    # Least and most terms, and digits.
    SIZES: ClassVar = {"three terms": (2, 3, 1), "four terms": (4, 4, 1), "two digits": (2, 2, 2)}
    classes = 13
    adapted, at_once = 30, 8
    TESTS, POOL = 400, 2000
    ANSWER = 6  # tokens of an answer with sign, digits and end, at most

    @cached_property
    def _vocabulary(self) -> Tensor:
        _, tokenizer = self._loaded
        ids = {token for text in (" 0", " -1", "23456789") for token in tokenizer(text)["input_ids"]}
        return torch.tensor([*sorted(ids), tokenizer.eos_token_id])

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

    def _examples(self, sums: list[tuple[str, int]]) -> Examples:
        _, tokenizer = self._loaded
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
        return Examples((self._states(rows), torch.tensor(places)), torch.tensor(labels))

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
