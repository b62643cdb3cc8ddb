from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

from flatlora_optim import FlatLoRAOptimizer
from helpers import fingerprint, flatlora, lora_mlp

# Triton's interpreter takes a tenth of a second for what a GPU does in a few microseconds.
EXAMPLES = 3 if os.environ.get("TRITON_INTERPRET") == "1" else 25

# Derandomized: a failure in the suite is a failure for everybody. `make explore` searches with fresh seeds;
# without a database, a seed alone brings its failure back.
settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "explore",
    deadline=None,
    database=None,
    max_examples=200,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model() -> nn.Module:
    return lora_mlp()


@pytest.fixture
def before(model: nn.Module) -> dict[str, Tensor]:
    return fingerprint(model)


@pytest.fixture
def optimizer(model: nn.Module) -> FlatLoRAOptimizer:
    return flatlora(model)
