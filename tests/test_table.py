"""Noise read from a shared table: a function of the key alone, exactly Gaussian."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from flatlora_optim import NoiseTable
from flatlora_optim.noise import NoiseKey
from helpers import changed_weights, fingerprint, flatlora, lora_mlp, loss_of, mlp_batch

KEYS = st.builds(NoiseKey, st.integers(0, 1), st.integers(0, 70), st.integers(0, 1))


def numbers(table: NoiseTable, key: NoiseKey, number: int = 0, size: int = 64) -> Tensor:
    return table.block(key, number, torch.empty(size)).clone()


@given(st.lists(KEYS, min_size=1, max_size=8), st.integers(0, 3))
def test_a_block_follows_from_its_key_whatever_was_read_before(keys: list[NoiseKey], number: int) -> None:
    used = NoiseTable(1 << 9)
    for key in keys:
        numbers(used, key)
    assert torch.equal(numbers(used, keys[-1], number), numbers(NoiseTable(1 << 9), keys[-1], number))


def test_another_seed_one_step_later_is_another_table() -> None:
    used = NoiseTable(1 << 12)
    numbers(used, NoiseKey(1, 4))
    for key in (NoiseKey(2, 5), NoiseKey(2, 6, replica=1)):
        assert torch.equal(numbers(used, key), numbers(NoiseTable(1 << 12), key))


def test_the_table_is_gaussian_and_renewed_bit_by_bit() -> None:
    size = 1 << 14
    steps = (9, 10, 10 + 64)
    tables = [NoiseTable(size).places(NoiseKey(0, step), [0], [16], torch.device("cpu"))[0] for step in steps]
    for values in tables:
        assert stats.kstest(values.numpy(), "norm").pvalue > 1e-4
    before, after, later = (values.view(64, -1) for values in tables)
    assert (before == after).all(1).sum() == 63
    assert not (after == later).all(1).any()


def test_sizes_that_do_not_fit() -> None:
    for size in (0, -64, 100):
        with pytest.raises(ValueError, match="positive multiple of 64"):
            NoiseTable(size)
    with pytest.raises(ValueError, match=r"of 64 numbers is too small for blocks of 128.*at least 512"):
        numbers(NoiseTable(64), NoiseKey(0, 0), size=128)


def test_training_with_a_table() -> None:
    model = lora_mlp(torch.bfloat16)
    optimizer = flatlora(model, noise="table")
    clean = fingerprint(model)
    for step in range(3):
        loss_of(model, mlp_batch(step, torch.bfloat16)).backward()
        assert changed_weights(model, clean)
        optimizer.step()
        assert not changed_weights(model, clean)
