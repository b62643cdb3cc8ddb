"""The noise is the paper's: eps[i, j] ~ N(0, sigma_t^2 * ||W'[i]||^2 / n), and nothing else decides it.

The statistical tests have fixed seeds. With any other seed, each would raise a false alarm with
probability FALSE_ALARM.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from scipy import stats
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flatlora_optim import FlatLoRAOptimizer, find_targets
from flatlora_optim.kernels import plain
from flatlora_optim.kernels.grid import Grid
from flatlora_optim.kernels.part import Keep
from flatlora_optim.noise import GaussianNoise, Noise, NoiseKey
from flatlora_optim.noise.key import _mix32, _mix64
from flatlora_optim.targets.scales import RowNorms, merged_norms, row_scales
from helpers import (
    ConvNet,
    OwnLoRA,
    TinyLM,
    fingerprint,
    flatlora,
    lora_convnet,
    lora_gpt2,
    lora_lm,
    lora_mlp,
    randomize_adapters,
    trainable,
    untouched_rng,
    with_lora,
)

FALSE_ALARM = 1e-6
SIGMA = 0.1


class Ones:
    """A noise source that makes the row scales visible: eps[i, j] = scale[i]."""

    def block(self, key: NoiseKey, number: int, out: Tensor) -> Tensor:
        return out.fill_(1)


def noise_on(model: nn.Module, optimizer: FlatLoRAOptimizer) -> dict[str, Tensor]:
    """eps of each perturbed weight. In float64 models the difference is exact to float32."""
    weights = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    clean = {n: p.detach().clone() for n, p in weights.items()}
    with optimizer.perturbed():
        found = {n: p.detach() - clean[n] for n, p in weights.items()}
    return {n: eps for n, eps in found.items() if eps.any()}


def rows_first(tensor: Tensor, layer: nn.Module) -> Tensor:
    """Shape (m, n): one row per output neuron."""
    return tensor.T if isinstance(layer, Conv1D) else tensor.flatten(1)


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, Any, nn.Module]]:
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            yield name, module, module.base_layer


def expected_scales(model: nn.Module) -> dict[str, Tensor]:
    """sigma * ||W'[i]|| / sqrt(n) by the dense products that PEFT itself makes."""
    scales = {}
    for name, layer, base in adapter_layers(model):
        merged = base.weight.detach().clone()
        for adapter in layer.active_adapters:
            merged += layer.get_delta_weight(adapter).detach().reshape(merged.shape)
        merged = rows_first(merged, base)
        scales[f"{name}.base_layer.weight"] = SIGMA * merged.norm(dim=1) / math.sqrt(merged.shape[1])
    return scales


# ---------------------------------------------------------------------- strength


def two_adapters() -> nn.Module:
    model = lora_mlp()
    model.add_adapter("second", LoraConfig(target_modules=["fc1", "fc2"], r=3, lora_alpha=9))
    randomize_adapters(model, seed=1)
    model.base_model.set_adapter(["default", "second"])
    return model


def of_another_type(config: Any) -> nn.Module:
    plain = ConvNet() if "conv2" in config.target_modules else TinyLM()
    if getattr(config, "fan_in_fan_out", False):
        plain.mix = Conv1D(8, 8)
    model = get_peft_model(plain, config)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.normal_(std=0.3)
    return model


ADALORA: dict[str, Any] = {
    "target_modules": ["mix"],
    "init_r": 3,
    "target_r": 2,
    "total_step": 10,
    "tinit": 1,
    "tfinal": 1,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lora_mlp,
    "rslora": lambda: lora_mlp(use_rslora=True, r=4),
    "dora": lambda: lora_mlp(use_dora=True),
    "bias": lambda: lora_mlp(lora_bias=True),
    "rank pattern": lambda: lora_mlp(rank_pattern={"fc1": 4}, alpha_pattern={"fc2": 7}),
    "several adapters": two_adapters,
    "conv2d": lora_convnet,
    "conv1d": lora_gpt2,
    "embedding": lora_lm,
    "tied embedding": lambda: lora_lm(tied=True),
    "adalora": lambda: of_another_type(AdaLoraConfig(**ADALORA)),
    "adalora conv1d": lambda: of_another_type(AdaLoraConfig(**ADALORA, fan_in_fan_out=True)),
    "loha": lambda: of_another_type(LoHaConfig(target_modules=["mix"], r=2, alpha=3)),
    "loha conv2d": lambda: of_another_type(LoHaConfig(target_modules=["conv2", "head"], r=2, alpha=3)),
    "lokr": lambda: of_another_type(LoKrConfig(target_modules=["mix", "lm_head"], r=2, alpha=3)),
}


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in MODELS.items()])
def test_each_row_gets_the_strength_of_its_merged_weight(make: Callable[[], nn.Module]) -> None:
    model = make().double()
    with torch.no_grad():
        for _, _, base in adapter_layers(model):
            # Rows of different size, so that the other axis would give other numbers.
            rows = rows_first(base.weight, base)
            rows *= torch.linspace(0.3, 3, len(rows)).view(-1, 1)
    optimizer = flatlora(model, sigma=SIGMA, noise=Ones())
    for step in range(2):
        expected = expected_scales(model)
        eps = noise_on(model, optimizer)
        assert eps.keys() == expected.keys()
        for name, layer, base in adapter_layers(model):
            key = f"{name}.base_layer.weight"
            actual = rows_first(eps[key], base)
            torch.testing.assert_close(actual, expected[key][:, None].expand_as(actual), rtol=1e-4, atol=1e-8)
            assert len(layer.active_adapters) > 0
        optimizer.step()
        randomize_adapters(model, seed=7 + step)  # the strength follows the adapters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_strength_is_computed_in_float32_for_half_weights(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 4096).to(dtype)
    layer = OwnLoRA(weight.clone())
    optimizer = flatlora(layer, sigma=1.0)
    optimizer.perturb()
    eps = layer.weight.double() - weight.double()
    merged = weight.double() + 1.5 * layer.lora_B.double() @ layer.lora_A.double()
    torch.testing.assert_close(eps.norm(dim=1), merged.norm(dim=1), rtol=0.05, atol=0)


@pytest.mark.parametrize("name", ["linear", "adalora", "loha"])
def test_the_strength_is_the_same_under_autocast(name: str) -> None:
    model, strengths = MODELS[name](), []
    for enabled in (False, True):
        optimizer = flatlora(model)
        with torch.autocast("cpu", enabled=enabled), optimizer.perturbed():
            strengths.append(optimizer.metrics()["noise_norm"])
    assert strengths[0] == strengths[1] > 0


def test_the_strength_follows_new_base_weights() -> None:
    """Also when they were loaded while the optimizer was perturbed, but that layer was not."""
    model = lora_mlp().double()
    first, second = model.base_model.model.fc1, model.base_model.model.fc2
    base = torch.optim.SGD([{"params": trainable(layer)} for layer in (first, second)], lr=0.1)
    optimizer = FlatLoRAOptimizer(base, model, sigma=SIGMA, schedule="constant", noise=Ones())
    noise_on(model, optimizer)
    optimizer.step()
    base.param_groups[0]["sigma"] = 0.0
    optimizer.perturb()
    with torch.no_grad():
        first.base_layer.weight.mul_(3)
    optimizer.restore()
    optimizer.step()
    base.param_groups[0]["sigma"] = SIGMA
    expected = expected_scales(model)
    for name, eps in noise_on(model, optimizer).items():
        torch.testing.assert_close(eps[:, 0], expected[name], rtol=1e-4, atol=0)


def test_the_strength_follows_weights_that_were_written_through_their_data() -> None:
    model = lora_mlp().double()
    optimizer = flatlora(model, noise=Ones())
    noise_on(model, optimizer)
    optimizer.step()
    model.base_model.model.fc1.base_layer.weight.data.mul_(3)
    expected = expected_scales(model)
    for name, eps in noise_on(model, optimizer).items():
        torch.testing.assert_close(eps[:, 0], expected[name], rtol=1e-4, atol=0)


@pytest.mark.parametrize(("columns", "scale"), [(0, 0.6), (1, 0.6), (4, 0.3)])
def test_rows_that_are_not_finite_have_no_scale(columns: int, scale: float) -> None:
    norms = torch.tensor([2.0, math.nan, math.inf, 0.0])
    (scales,) = row_scales([norms], [0.3], [columns])
    torch.testing.assert_close(scales, torch.tensor([scale, 0, 0, 0]))


@pytest.mark.parametrize("elements", [1, 80, 1 << 24])
def test_norms_are_the_same_in_any_batches(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    rows = [RowNorms(target) for target in find_targets(lora_mlp()).targets]
    expected = merged_norms(rows)
    monkeypatch.setattr("flatlora_optim.targets.scales._ELEMENTS_AT_ONCE", elements)
    for found, norms in zip(merged_norms(rows), expected, strict=True):
        assert found is not None
        assert norms is not None
        assert torch.equal(found, norms)


def test_without_an_active_adapter_there_are_no_norms() -> None:
    model = lora_mlp()
    rows = [RowNorms(target) for target in find_targets(model).targets]
    with model.disable_adapter():
        assert merged_norms(rows) == [None, None]


# ---------------------------------------------------------------------- distribution

ROWS, COLUMNS = 96, 512
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(COLUMNS, ROWS),
    "conv1d": lambda: Conv1D(ROWS, COLUMNS),
    "conv2d": lambda: nn.Conv2d(32, ROWS, 4),
    "embedding": lambda: nn.Embedding(ROWS, COLUMNS),
}


def sample(make: Callable[[], nn.Module], **options: Any) -> Tensor:
    """eps of one such layer, divided by its expected strength: should be standard normal."""
    base = make()
    with torch.no_grad():
        rows = rows_first(base.weight, base)
        rows.copy_(torch.randn(ROWS, COLUMNS) * torch.logspace(-1, 1, ROWS).view(-1, 1))
    model = with_lora(
        nn.ModuleDict({"layer": base}), ["layer"], r=4, fan_in_fan_out=isinstance(base, Conv1D)
    ).double()
    ((name, expected),) = expected_scales(model).items()
    eps = noise_on(model, flatlora(model, sigma=SIGMA, **options))[name]
    return rows_first(eps, base) / expected[:, None]


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in LAYERS.items()])
def test_noise_is_standard_normal_times_the_row_strength(make: Callable[[], nn.Module]) -> None:
    z = sample(make)
    assert z.shape == (ROWS, COLUMNS)
    variances = stats.chi2(COLUMNS)
    tails = [min(variances.cdf(s), variances.sf(s)) for s in z.square().sum(1).tolist()]
    assert min(tails) > FALSE_ALARM / (2 * ROWS), "the variance of a row is off"
    assert 2 * stats.norm.sf(abs(z.sum().item()) / math.sqrt(z.numel())) > FALSE_ALARM, "the mean is not zero"
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > FALSE_ALARM, "not normal"


def independent(a: Tensor, b: Tensor) -> bool:
    """Whether the correlation of two standard normal samples is that of independent ones."""
    return 2 * stats.norm.sf(abs((a * b).sum().item()) / math.sqrt(a.numel())) > FALSE_ALARM


def test_elements_are_independent_of_their_neighbours() -> None:
    z = sample(LAYERS["linear"])
    assert independent(z[1:], z[:-1])
    assert independent(z[:, 1:], z[:, :-1])
    assert independent(z[: ROWS // 2], z[ROWS // 2 :])


def test_seeds_steps_and_layers_are_independent() -> None:
    def layers(seed: int, step: int) -> list[Tensor]:
        model = with_lora(
            nn.ModuleDict({"a": nn.Linear(COLUMNS, ROWS), "b": nn.Linear(COLUMNS, ROWS)}), ["a", "b"]
        ).double()
        optimizer = flatlora(model, sigma=SIGMA, seed=seed)
        for _ in range(step):
            with optimizer.perturbed():
                pass
            optimizer.step()
        expected = expected_scales(model)
        return [eps / expected[name][:, None] for name, eps in noise_on(model, optimizer).items()]

    streams = [
        z for seed, step in [(1, 0), (1, 1), (2, 0), (-1, 0), (2**32 + 1, 0)] for z in layers(seed, step)
    ]
    for i, a in enumerate(streams):
        for b in streams[:i]:
            assert independent(a, b)


# ---------------------------------------------------------------------- streams


def test_noise_depends_on_the_seed_alone() -> None:
    def run(global_seed: int) -> dict[str, Tensor]:
        model = lora_mlp()
        torch.manual_seed(global_seed)
        with flatlora(model, seed=7).perturbed():
            return fingerprint(model)

    first, second = run(1), run(2)
    assert all(torch.equal(first[name], second[name]) for name in first)


@given(
    rows=st.integers(1, 12),
    row_size=st.sampled_from([1, 7, 20_000, 70_000]),
    cuts=st.lists(st.integers(0, 12), max_size=3),
    left=st.floats(0, 1),
    row_dim=st.integers(0, 1),
)
def test_any_shard_gets_its_part_of_the_whole(
    rows: int, row_size: int, cuts: list[int], left: float, row_dim: int
) -> None:
    key = NoiseKey(3, 5)
    scales = torch.rand((rows, row_size)[row_dim])
    whole = torch.zeros(rows, row_size)
    Noise(GaussianNoise(), key, Grid(rows, row_size, "cpu", 11), scales, row_dim).add_to(whole)
    bounds = sorted({0, rows, *(cut for cut in cuts if cut < rows)})
    middle = int(left * row_size)
    for lo, hi in itertools.pairwise(bounds):
        for columns in (slice(0, middle), slice(middle, row_size)):
            part = torch.zeros(hi - lo, row_size)[:, columns].clone()
            grid = Grid(rows, row_size, "cpu", 11, first_row=lo, columns=columns)
            if part.numel():
                Noise(GaussianNoise(), key, grid, scales, row_dim).add_to(part)
            assert torch.equal(part, whole[lo:hi, columns])


def test_blocks_may_be_made_in_any_order() -> None:
    grid = Grid(12, 80_000, "cpu", 4)
    noise = Noise(GaussianNoise(), NoiseKey(0, 0), grid, torch.ones(12))
    spans = grid.spans(12)
    assert len(spans) == grid.blocks == 4
    forward = [noise.block(*span).clone() for span in spans]
    backward = [noise.block(*span).clone() for span in reversed(spans)]
    for a, b in zip(forward, reversed(backward), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("rows", "row_size", "device", "blocks"),
    [
        (12, 80_000, "cpu", 4),
        (12, 16 * 80_000, "cuda", 4),
        (300_000, 1, "cpu", 2),
        (5, 300_000, "cpu", 5),
        (4, 0, "cpu", 1),
    ],
)
def test_blocks_hold_as_many_whole_rows_as_fit(rows: int, row_size: int, device: str, blocks: int) -> None:
    """Seeds are counted by block: other blocks are other noise."""
    assert Grid(rows, row_size, device).blocks == blocks


def test_a_source_is_asked_for_whole_blocks_and_no_more() -> None:
    """Numbers of other shapes may be other numbers, and a part of them the wrong one."""
    asked = []

    class Noted(GaussianNoise):
        def block(self, key: NoiseKey, number: int, out: Tensor) -> Tensor:
            asked.append((number, out.shape[0]))
            return super().block(key, number, out)

    for rows in (slice(0, 5), slice(3, 5)):  # all of them, and a shard
        grid = Grid(5, 1 << 17, "cpu", first_block=3, first_row=rows.start)
        Noise(Noted(), NoiseKey(0, 0), grid, torch.ones(5)).add_to(torch.zeros(5, 1 << 17)[rows])
    assert sorted(asked) == [(3, 2), (4, 2), (4, 2), (5, 1), (5, 1)]


def test_the_share_of_the_noise_that_rounding_takes_away() -> None:
    weight = torch.ones(8, 2, 3, dtype=torch.bfloat16)
    scales = torch.tensor([100.0, 100, 1e-6, 1e-6, 1e-6, 1e-6, 0, 0])
    noise = Noise(GaussianNoise(), NoiseKey(0, 0), Grid(8, 6, "cpu"), scales)
    assert noise.share_lost(weight, 1.0) == pytest.approx(4 / 6)
    assert noise.share_lost(weight, 1e8) == 0
    assert noise.share_lost(weight, 0.0) == 0
    assert noise.share_lost(weight[:0], 1.0) == 0
    of_one = Noise(GaussianNoise(), NoiseKey(0, 0), Grid(1, 1, "cpu"), scales[2:3])
    assert of_one.share_lost(weight[:1, 0, :1], 1.0) == 1


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_parts_on_the_cpu_go_to_threads_and_others_one_by_one(device: str, two_threads: None) -> None:
    noise = Noise(GaussianNoise(), NoiseKey(0, 0), Grid(12, 80_000, "cpu"), torch.ones(12))
    visits = []

    class Visited(plain.Part):
        def perturb(self) -> None:
            visits.append((self.lo, threading.current_thread()))

    rows = torch.empty(1, device=device)
    Visited.perturb_all([Visited(rows, noise, lo, lo + 1, Keep.NOTHING) for lo in range(12)])
    visited, threads = zip(*visits, strict=True)
    assert sorted(visited) == list(range(12))
    assert (threading.current_thread() in threads) == (device == "meta")


def test_the_number_of_threads_does_not_matter() -> None:
    def run(threads: int) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            layer = OwnLoRA(torch.ones(200, 2000))
            nn.init.zeros_(layer.lora_B)  # a matmul may round in another order
            optimizer = flatlora(layer)
            optimizer.perturb()
            return layer.weight.detach().clone()
        finally:
            torch.set_num_threads(before)

    one = run(1)
    assert torch.equal(run(2), one)
    assert torch.equal(run(3), one)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_torch_operations_take_the_numbers_from_a_generator_of_their_own(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, bits, out = NoiseKey(3, 4), 32 if device == "cpu" else 64, torch.empty(1000)
    if device == "cuda":  # what torch would do there can be seen here, but for the device's numbers
        own = torch.Generator
        monkeypatch.setattr(torch, "Generator", lambda device=None: own())
        out = Mock(spec=Tensor, device=torch.device(device), normal_=out.normal_)
    with untouched_rng():
        z = plain.fill(out, key, 5)
    expected = torch.Generator().manual_seed(key.block_seed(5, bits))
    assert torch.equal(z, torch.empty(1000).normal_(generator=expected))


KEYS = st.builds(NoiseKey, st.integers(-(2**80), 2**80), st.integers(0, 2**32 - 101), st.integers(0, 2**16))


def test_hashes_are_the_published_ones() -> None:
    """Of SplitMix64, seeded with 1234567, and of MurmurHash3 for an empty key."""
    states = [1234567 + i * 0x9E3779B97F4A7C15 for i in range(5)]
    assert [_mix64(state) for state in states] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [_mix32(seed) for seed in (0, 1, 0xFFFFFFFF)] == [0, 0x514E28B7, 0x81F16F39]


@pytest.mark.parametrize(
    ("key", "block", "words", "seeds"),
    [
        (NoiseKey(0, 0), 0, (2065550767, 3793791033, 0, 0), (4226243123, 2558736989570252433)),
        (NoiseKey(42, 1000, 3), 7, (803958421, 3184996902, 1000, 3), (893646130, 5931082438910989574)),
        (
            NoiseKey(-(2**70) - 5, 12345, 2),
            70_000,
            (1606812258, 380750761, 12345, 2),
            (1347487469, 14923420659560681273),
        ),
        (
            NoiseKey(2**40 + 1, 2**33, 2**16 - 1),
            2**32 - 1,
            (1623510469, 1835336310, 0, 65535),
            (2811003226, 7071416879718485319),
        ),
    ],
)
def test_keys_give_the_numbers_that_they_gave_in_earlier_releases(
    key: NoiseKey, block: int, words: tuple[int, ...], seeds: tuple[int, int]
) -> None:
    """A resumed run goes on with the noise it would have had."""
    assert key.words == words
    assert (key.block_seed(block), key.block_seed(block, 64)) == seeds


@pytest.mark.parametrize("bits", [32, 64])
@given(KEYS, st.integers(0, 2**32 - 5000))
def test_no_two_blocks_of_a_step_share_a_seed(bits: int, key: NoiseKey, first: int) -> None:
    assert len(set(key.block_seeds(range(first, first + 5000), bits))) == 5000


@given(
    st.integers(-(2**80), 2**80), st.integers(0, 2**32 - 200), st.integers(0, 2**32 - 200), st.integers(0, 3)
)
def test_no_two_blocks_of_a_run_share_a_seed_of_64_bits(
    seed: int, step: int, block: int, replica: int
) -> None:
    keys = [NoiseKey(seed, step + i, replica) for i in range(50)]
    assert len({s for key in keys for s in key.block_seeds(range(block, block + 50), 64)}) == 2500


@given(KEYS, KEYS, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_no_two_blocks_of_a_run_share_a_counter(one: NoiseKey, other: NoiseKey, a: int, b: int) -> None:
    """Philox is a bijection of counters, so they have no number in common but by chance."""
    other = other._replace(seed=one.seed)
    assert ((*one.words, a) == (*other.words, b)) == ((one, a) == (other, b))


@given(KEYS, st.integers(1, 100), st.integers(0, 2**20))
def test_other_seeds_steps_and_replicas_give_other_blocks(key: NoiseKey, by: int, block: int) -> None:
    others = [
        key._replace(seed=key.seed + by),
        key._replace(step=key.step + by),
        key._replace(replica=key.replica + by),
    ]
    for bits in (32, 64):
        assert len({k.block_seed(block, bits) for k in (key, *others)}) == 4
    assert len({k.words for k in (key, *others)}) == 4
