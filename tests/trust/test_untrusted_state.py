"""States from anywhere: plain types only, and refused as a whole or loaded as a whole."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flatlora_optim import FlatLoRAOptimizer
from helpers import changed_weights, fingerprint, flatlora, lora_mlp, train, trainable

State = dict[str, Any]


def build(**options: Any) -> tuple[nn.Module, FlatLoRAOptimizer]:
    model = lora_mlp()
    options = {"schedule": "cosine", "total_steps": 10, **options}
    return model, flatlora(model, base=torch.optim.AdamW, lr=0.01, **options)


def by_torch(state: State, folder: Path) -> State:
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def by_safetensors_and_json(state: State, folder: Path) -> State:
    tensors = {
        f"{i}.{name}": value for i, entries in state["state"].items() for name, value in entries.items()
    }
    save_file(tensors, folder / "state.safetensors")
    (folder / "groups.json").write_text(json.dumps(state["param_groups"]))
    loaded: dict[int, State] = {}
    for key, value in load_file(folder / "state.safetensors").items():
        number, name = key.split(".")
        loaded.setdefault(int(number), {})[name] = value
    return {"state": loaded, "param_groups": json.loads((folder / "groups.json").read_text())}


@pytest.mark.parametrize("store", [by_torch, by_safetensors_and_json])
def test_plain_types_are_enough(store: Callable[[State, Path], State], tmp_path: Path) -> None:
    # Numbers of NumPy would need an unpickler that trusts NumPy.
    model, optimizer = build(sigma=np.float32(0.25), seed=np.int64(2**40), total_steps=np.int64(10))
    optimizer.param_groups[0]["sigma"] = np.float64(0.125)
    train(model, optimizer, range(4))
    other_model, other = build(seed=5)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(store(optimizer.state_dict(), tmp_path))
    assert train(other_model, other, range(4, 8)) == train(model, optimizer, range(4, 8))


# ---------------------------------------------------------------------- refusals

HOSTILE = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        2**200,
        10**400,
        1.5,
        math.nan,
        math.inf,
        -math.inf,
        "x",
        b"x",
        "__class__",
        [],
        [[]],
        {},
        (),
        object(),
        torch.ones(3),
        torch.ones(16, 2, dtype=torch.complex64),
        torch.empty(16, 2, device="meta"),
        torch.ones(16, 2).to_sparse(),
        torch.tensor(math.nan),
    ]
)


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to everything inside nested dicts and lists."""
    items = (
        node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    )
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def is_ours(path: tuple[Any, ...]) -> bool:
    """Whether the base's own state begins deeper: what is in there is for the base to check."""
    if path[0] == "state":
        return len(path) == 1
    return len(path) < 3 or path[2] in ("params", "sigma") or str(path[2]).startswith("flatlora_")


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[State], State]:
    """Changes a state in one to three places: replaces, drops, repeats or renames what is there."""
    steps = draw(
        st.lists(
            st.tuples(
                st.integers(0, 10**6),
                st.sampled_from(["replace", "drop", "rename", "repeat", "truncate"]),
                HOSTILE,
            ),
            min_size=1,
            max_size=3,
        )
    )

    def mutate(state: State) -> State:
        for number, what, value in steps:
            _mutate_once(state, number, what, value)
        return state

    return mutate


def _mutate_once(state: State, number: int, what: str, value: Any) -> None:
    found = [path for path in places(state) if is_ours(path)]
    if not found:
        return  # all of it was dropped
    *path, key = found[number % len(found)]
    holder: Any = state
    for part in path:
        holder = holder[part]
    if isinstance(holder, tuple):
        return
    if what == "replace":
        holder[key] = value
    elif what == "drop":
        del holder[key]
    elif what == "rename" and isinstance(holder, dict):
        holder["flatlora_new" if key != "params" else "parameters"] = holder.pop(key)
    elif what == "repeat" and isinstance(holder, list):
        holder.append(copy.copy(holder[key]))
    elif what == "truncate" and isinstance(holder[key], Tensor) and holder[key].ndim:
        holder[key] = holder[key][:-1]


def seen(model: nn.Module, optimizer: FlatLoRAOptimizer) -> Any:
    """All that a refused state must leave as it is, in comparable form."""
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    state = [
        {name: v.tolist() if isinstance(v, Tensor) else v for name, v in optimizer.state[p].items()}
        for p in trainable(model)
    ]
    weights = {name: p.tolist() for name, p in model.named_parameters()}
    parameters = [[id(p) for p in g["params"]] for g in optimizer.param_groups]
    own = optimizer.step_count, optimizer.seed, optimizer.sigma, optimizer.is_perturbed
    return groups, state, weights, parameters, own


def reorders(state: State) -> bool:
    """Whether the state is well-formed, but gives the base the moments of another parameter: no optimizer
    can tell."""
    match state:
        case {"param_groups": [{"params": [*params]}]} if all(isinstance(p, int) for p in params):
            ours = GOOD["param_groups"][0]["params"]
            return params != ours and sorted(params) == sorted(ours)
    return False


TRAINED = build()
train(*TRAINED, range(2))
GOOD = copy.deepcopy(TRAINED[1].state_dict())


@given(mutate=mutations(), fresh=st.booleans(), perturbed=st.booleans())
def test_a_state_is_refused_as_a_whole_or_works(
    mutate: Callable[[State], State], fresh: bool, perturbed: bool
) -> None:
    model, optimizer = build()
    clean = fingerprint(model)
    if not fresh:
        train(model, optimizer, range(3))
    if perturbed:
        optimizer.perturb()
    before = seen(model, optimizer)
    state = mutate(copy.deepcopy(GOOD))
    assume(not reorders(state))
    try:
        optimizer.load_state_dict(state)
    except (TypeError, ValueError):
        assert seen(model, optimizer) == before
        train(model, optimizer, range(1))
    else:
        assert not optimizer.is_perturbed
        assert optimizer.state_dict()["param_groups"][0].keys() >= GOOD["param_groups"][0].keys()
        optimizer.total_steps = optimizer.total_steps or 10  # a state may leave it for later
        train(model, optimizer, range(1))
    optimizer.restore()
    assert not changed_weights(model, clean)


@pytest.mark.parametrize("perturbed", [False, True])
def test_a_base_that_refuses_leaves_everything_as_it_was(perturbed: bool) -> None:
    model, optimizer = build()
    train(model, optimizer, range(2))
    if perturbed:
        optimizer.perturb()
    before = seen(model, optimizer)

    def refuse(*_: Any) -> None:
        raise RuntimeError("not mine")

    optimizer.register_load_state_dict_post_hook(refuse)
    with pytest.raises(ValueError, match=r"AdamW can't load this state.*not mine"):
        optimizer.load_state_dict(build()[1].state_dict())
    assert seen(model, optimizer) == before


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("flatlora_format", 2, "another version"),
        ("params", [0, 1, 2, 2], "names a parameter twice"),
    ],
)
def test_what_a_group_must_not_say(key: str, value: Any, match: str) -> None:
    state = copy.deepcopy(GOOD)
    state["param_groups"][0][key] = value
    model, optimizer = build()
    before = seen(model, optimizer)
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(state)
    assert seen(model, optimizer) == before


@pytest.mark.parametrize("key", ["lr", "betas", "eps"])
def test_a_truncated_group(key: str) -> None:
    state = copy.deepcopy(GOOD)
    del state["param_groups"][0][key]
    model, optimizer = build()
    before = seen(model, optimizer)
    with pytest.raises(ValueError, match=f"lacks '{key}'"):
        optimizer.load_state_dict(state)
    assert seen(model, optimizer) == before


def test_groups_that_disagree_on_the_step() -> None:
    def two_groups() -> FlatLoRAOptimizer:
        model = lora_mlp()
        first, *others = trainable(model)
        base = torch.optim.AdamW([{"params": [first]}, {"params": others}])
        return FlatLoRAOptimizer(base, model, sigma=0.1, schedule="constant")

    state = two_groups().state_dict()
    state["param_groups"][1]["flatlora_step"] = 3
    with pytest.raises(ValueError, match="disagree on 'flatlora_step'"):
        two_groups().load_state_dict(state)


def test_a_truncated_file(tmp_path: Path) -> None:
    """torch refuses it before any state exists."""
    torch.save(GOOD, tmp_path / "state.pt")
    data = (tmp_path / "state.pt").read_bytes()
    for length in (0, 10, len(data) // 2, len(data) - 1):
        (tmp_path / "short.pt").write_bytes(data[:length])
        with pytest.raises((RuntimeError, EOFError, OSError)):
            torch.load(tmp_path / "short.pt", weights_only=True)
