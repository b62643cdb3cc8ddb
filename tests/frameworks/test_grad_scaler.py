"""Plain loops with torch.amp.GradScaler, and the steps it skips."""

import pytest
import torch
from torch import nn

from common import Watch, adapter, flat_optimizer, identical, tiny_model, token_batches
from flatlora_optim import FlatLoRAOptimizer

OVERFLOW = 2


class Scaled:
    """A loop under fp16 autocast whose gradients overflow once."""

    def __init__(self, *, auto: bool) -> None:
        self.model = tiny_model().train()
        self.watch = Watch(self.model)
        self.optimizer = flat_optimizer(self.model, auto=auto)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        self.losses: list[float] = []

    def forward_backward(self, batch: dict[str, torch.Tensor], poison: bool) -> None:
        with torch.autocast("cpu", torch.float16):
            loss = self.model(**batch).loss
        self.scaler.scale(loss).backward()
        if poison:
            next(p for p in self.model.parameters() if p.requires_grad).grad.fill_(torch.inf)
        self.losses.append(loss.item())

    def update(self) -> None:
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def test_skipped_step_changes_nothing_and_the_next_has_the_same_noise() -> None:
    loop = Scaled(auto=True)
    batches = token_batches(5)
    for i, batch in enumerate(batches):
        loop.forward_backward(batch, poison=i == OVERFLOW)
        before, count = adapter(loop.model), loop.optimizer.step_count
        perturbed = [t.weight.tensor.clone() for t in loop.optimizer.targets]
        loop.update()
        skipped = i == OVERFLOW
        assert identical(before, adapter(loop.model)) is skipped
        assert loop.optimizer.step_count == count + (not skipped)
        assert loop.optimizer.is_perturbed is skipped
        if skipped:
            with torch.no_grad():
                loop.model.eval()(**batch)  # an evaluation right after it
            loop.model.train()(**batch)
            assert identical(perturbed, [t.weight.tensor for t in loop.optimizer.targets])
            state = loop.model.state_dict()
            assert all(torch.equal(state[k], v) for k, v in clean_state(loop).items())
    loop.watch.assert_noise_only_in_training()
    assert loop.watch.is_clean()
    assert loop.scaler.get_scale() == 2.0**9

    by_hand = Scaled(auto=False)
    for i, batch in enumerate(batches):
        with by_hand.optimizer.perturbed():
            by_hand.forward_backward(batch, poison=i == OVERFLOW)
        by_hand.update()
        assert by_hand.watch.is_clean()
    assert by_hand.losses == loop.losses
    assert identical(adapter(by_hand.model), adapter(loop.model))


def clean_state(loop: Scaled) -> dict[str, torch.Tensor]:
    """The frozen weights of an untouched model."""
    fresh = tiny_model()
    frozen = {name for name, p in fresh.named_parameters() if not p.requires_grad}
    return {name: value for name, value in fresh.state_dict().items() if name in frozen}


def test_a_skipped_last_step_leaves_no_noise_after_close() -> None:
    loop = Scaled(auto=True)
    loop.forward_backward(token_batches(1)[0], poison=True)
    loop.update()
    assert loop.optimizer.is_perturbed
    loop.optimizer.close()
    assert loop.watch.is_clean()


@pytest.mark.parametrize("scheduled", ["wrapper", "base"])
def test_schedulers_on_either_optimizer_drive_both(scheduled: str) -> None:
    model = tiny_model().train()
    optimizer = flat_optimizer(model)
    on: FlatLoRAOptimizer | torch.optim.Optimizer = optimizer if scheduled == "wrapper" else optimizer.base
    scheduler = torch.optim.lr_scheduler.LinearLR(on, 1.0, 0.0, total_iters=4)
    rates = []
    for batch in token_batches(3):
        model(**batch).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        assert optimizer.param_groups[0]["lr"] == optimizer.base.param_groups[0]["lr"]
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([7.5e-3, 5e-3, 2.5e-3])
    assert optimizer.step_count == 3
