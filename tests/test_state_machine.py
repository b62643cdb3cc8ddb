"""Random sequences of everything a training script may do, against a simple model of it.

The model knows which noise a step has (computed here from the paper's formula), whether the
weights should carry it, and which gradients each backward must give.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from flatlora_optim.kernels import has_triton, kernels_of
from flatlora_optim.noise import NoiseKey
from helpers import NORM_ERROR, fingerprint, flatlora, int_view, lora_mlp, loss_of, mlp_batch, trainable

SEED, SIGMA = 17, 0.2
BATCHES = st.integers(0, 3)


@dataclass
class Pending:
    """A forward that waits for its backward."""

    loss: Tensor
    gradients: list[Tensor]
    valid: bool = True
    """Whether the weights it was computed with are still there."""


class TrainingScript(RuleBasedStateMachine):
    @initialize(
        dtype=st.sampled_from([torch.float32, torch.bfloat16]), restore=st.sampled_from(["exact", "snapshot"])
    )
    def build(self, dtype: torch.dtype, restore: str) -> None:
        self.dtype = dtype
        self.model, self.reference = lora_mlp(dtype), lora_mlp(dtype)
        self.optimizer = flatlora(self.model, sigma=SIGMA, seed=SEED, restore=restore, lr=0.05)
        self.holds_memory = restore == "snapshot"
        self.clean = fingerprint(self.model)
        self.step_count = 0
        self.perturbed = self.explicit = False
        self.noisy: dict[str, Tensor] | None = None
        self.noises: dict[tuple[int, bytes], dict[str, Tensor]] = {}
        self.pending: list[Pending] = []
        self.gradients: list[Tensor] | None = None
        self.saved: tuple[dict[str, Any], list[Tensor]] | None = None

    # ------------------------------------------------------------------ the model

    def adapters(self) -> list[Tensor]:
        return [p.detach().clone() for p in trainable(self.model)]

    def sync_reference(self, weights: dict[str, Tensor]) -> nn.Module:
        """The same network, with given frozen weights, that no optimizer has ever seen."""
        ours = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, parameter in self.reference.named_parameters():
                parameter.copy_(weights[name].view(self.dtype) if name in weights else ours[name])
        return self.reference

    def draws_noise(self) -> None:
        """The first perturbation of a step decides its noise."""
        self.perturbed = True
        if self.noisy is not None:
            return
        self.noisy = fingerprint(self.model)
        for block, layer in enumerate(("fc1", "fc2")):
            name = f"base_model.model.{layer}.base_layer.weight"
            weight = self.clean[name].view(self.dtype).double()
            adapted = getattr(self.model.base_model.model, layer)
            merged = weight + adapted.scaling["default"] * (
                adapted.lora_B["default"].weight.detach().double()
                @ adapted.lora_A["default"].weight.detach().double()
            )
            scale = SIGMA * merged.norm(dim=1, keepdim=True) / math.sqrt(weight.shape[1])
            key = NoiseKey(SEED, self.step_count)
            z = kernels_of(weight.device).fill(torch.empty(weight.shape), key, block).double()
            actual = self.noisy[name].view(self.dtype).double()
            tolerance = 0.01 if self.dtype == torch.bfloat16 else NORM_ERROR
            assert ((actual - weight - scale * z).abs() <= tolerance * (weight.abs() + 4 * scale)).all()
        key = self.step_count, pickle.dumps([int_view(a).tolist() for a in self.adapters()])
        same = self.noises.setdefault(key, self.noisy)
        assert all(torch.equal(self.noisy[name], same[name]) for name in same)

    def is_restored(self) -> None:
        if self.perturbed:
            for pending in self.pending:
                pending.valid = False
        self.perturbed = self.explicit = False

    def step_ends(self) -> None:
        self.is_restored()
        for pending in self.pending:
            pending.valid = False
        self.noisy = None
        self.step_count += 1

    @invariant()
    def the_weights_are_as_they_should_be(self) -> None:
        expected = self.noisy if self.perturbed else self.clean
        assert expected is not None
        now = fingerprint(self.model)
        assert all(torch.equal(now[name], expected[name]) for name in expected)
        assert self.optimizer.is_perturbed == self.perturbed
        assert self.optimizer.step_count == self.step_count
        assert self.holds_memory or (self.optimizer.memory() > 0) == self.perturbed

    @invariant()
    def the_gradients_are_as_they_should_be(self) -> None:
        actual = [p.grad for p in trainable(self.model)]
        if self.gradients is None:
            assert all(grad is None for grad in actual)
        else:
            assert all(torch.equal(a, e) for a, e in zip(actual, self.gradients, strict=True))

    # ------------------------------------------------------------------ training

    def forward_in_training(self, batch: int) -> Pending:
        data = mlp_batch(batch, self.dtype)
        loss = loss_of(self.model, data)
        self.draws_noise()
        reference = self.sync_reference(self.noisy)
        gradients = torch.autograd.grad(loss_of(reference, data), trainable(reference))
        return Pending(loss, list(gradients))

    def accumulate(self, gradients: list[Tensor]) -> None:
        so_far = self.gradients
        self.gradients = (
            gradients if so_far is None else [a + b for a, b in zip(so_far, gradients, strict=True)]
        )

    @rule(batch=BATCHES)
    def forward(self, batch: int) -> None:
        self.pending.append(self.forward_in_training(batch))

    @precondition(lambda self: self.pending)
    @rule(data=st.data())
    def backward(self, data: st.DataObject) -> None:
        pending = self.pending.pop(data.draw(st.integers(0, len(self.pending) - 1)))
        if pending.valid:
            pending.loss.backward()
            self.accumulate(pending.gradients)
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                pending.loss.backward()
            self.zero_grad()

    @rule()
    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
        self.gradients = None

    @rule()
    def step(self) -> None:
        before, gradients = self.adapters(), self.gradients
        self.optimizer.step()
        self.step_ends()
        if gradients is not None:
            expected = [a.add(g, alpha=-0.05) for a, g in zip(before, gradients, strict=True)]
            assert all(torch.equal(a, e) for a, e in zip(self.adapters(), expected, strict=True))

    @rule(batch=BATCHES, fails=st.sampled_from([None, RuntimeError, KeyboardInterrupt]))
    def step_with_closure(self, batch: int, fails: type[BaseException] | None) -> None:
        def closure() -> Tensor:
            self.zero_grad()
            pending = self.forward_in_training(batch)
            pending.loss.backward()
            self.accumulate(pending.gradients)
            if fails is not None:
                raise fails
            return pending.loss

        if fails is None:
            self.optimizer.step(closure)
            self.step_ends()
        else:
            with pytest.raises(fails):
                self.optimizer.step(closure)
            self.is_restored()

    @rule(batch=BATCHES, fails=st.booleans())
    def perturbed_block(self, batch: int, fails: bool) -> None:
        was_explicit = self.explicit
        try:
            with self.optimizer.perturbed():
                self.pending.append(self.forward_in_training(batch))
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        if not was_explicit:  # the noise of a `perturb()` before outlives the block
            self.is_restored()

    @rule()
    def perturb(self) -> None:
        self.optimizer.perturb()
        self.draws_noise()
        self.explicit = True

    @rule()
    def restore(self) -> None:
        self.optimizer.restore()
        self.is_restored()

    @rule()
    def failing_forward(self) -> None:
        with pytest.raises(RuntimeError, match="shapes"):
            self.model(torch.ones(2, 7, dtype=self.dtype))
        if not self.explicit:
            self.is_restored()

    # ------------------------------------------------------------------ clean observers

    def looks(self, observe: Callable[[], Tensor], batch: int) -> None:
        reference = self.sync_reference(self.clean)
        with torch.no_grad():
            assert torch.equal(observe().detach(), reference(mlp_batch(batch, self.dtype)[0]))

    @rule(batch=BATCHES)
    def no_grad_forward(self, batch: int) -> None:
        with torch.no_grad():
            self.looks(lambda: self.model(mlp_batch(batch, self.dtype)[0]), batch)

    @precondition(lambda self: not self.explicit)
    @rule(batch=BATCHES)
    def eval_forward(self, batch: int) -> None:
        self.model.eval()
        self.looks(lambda: self.model(mlp_batch(batch, self.dtype)[0]), batch)
        self.model.train()

    @rule(batch=BATCHES, fails=st.booleans())
    def clean_block(self, batch: int, fails: bool) -> None:
        try:
            with self.optimizer.clean():
                self.looks(lambda: self.model(mlp_batch(batch, self.dtype)[0]), batch)
                with torch.enable_grad():
                    self.model(mlp_batch(batch, self.dtype)[0])
                now = fingerprint(self.model)
                assert all(torch.equal(now[name], self.clean[name]) for name in now)
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass

    @rule()
    def failing_observer(self) -> None:
        with torch.no_grad(), pytest.raises(RuntimeError, match="shapes"):
            self.model(torch.ones(2, 7, dtype=self.dtype))

    @rule()
    def save_model(self) -> None:
        state = self.model.state_dict()
        assert all(torch.equal(int_view(state[name]), bits) for name, bits in self.clean.items())

    @rule()
    def copy_model(self) -> None:
        if self.perturbed:
            with pytest.raises(RuntimeError, match="can't copy"):
                copy.deepcopy(self.model)
        elif not self.pending:
            twin = copy.deepcopy(self.model)
            loss_of(twin, mlp_batch(0, self.dtype))

    # ------------------------------------------------------------------ checkpoints

    @rule()
    def save(self) -> None:
        self.saved = copy.deepcopy(self.optimizer.state_dict()), self.adapters()

    @precondition(lambda self: self.saved)
    @rule()
    def load(self) -> None:
        assert self.saved is not None
        state, adapters = self.saved
        self.optimizer.load_state_dict(copy.deepcopy(state))
        with torch.no_grad():
            for parameter, value in zip(trainable(self.model), adapters, strict=True):
                parameter.copy_(value)
        self.step_ends()
        self.step_count = state["param_groups"][0]["flatlora_step"]

    @rule()
    def load_nonsense(self) -> None:
        with pytest.raises(ValueError, match="param groups"):
            self.optimizer.load_state_dict({"state": {}, "param_groups": []})


TestTrainingScript = pytest.mark.filterwarnings("ignore:optimizer.step.. came without")(
    TrainingScript.TestCase
)
EXAMPLES = 3 if has_triton(torch.device("cpu")) else max(40, settings().max_examples)
TestTrainingScript.settings = settings(max_examples=EXAMPLES, stateful_step_count=40)
