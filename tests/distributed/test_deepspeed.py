"""DeepSpeed's ZeRO-0, 1 and 2: the same training as in a loop written by hand. On a CPU it needs
``DS_ACCELERATOR=cpu``, which is set here."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from common import Recording, flat_optimizer, tiny_model, token_rows
from flatlora_optim import FlatLoRAOptimizer
from helpers import changed_weights, fingerprint, lora_mlp, mlp_batch, trainable
from launch import launch, refusal

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

STEPS, WINDOW = 4, 2
KINDS = [(stage, dtype, False) for dtype in (torch.float32, torch.bfloat16) for stage in (0, 1, 2)]
KINDS += [(1, torch.float32, True), (2, torch.bfloat16, True)]  # with the optimizer's state offloaded


def adamw(groups: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """As trainers make them: one of them is empty, and DeepSpeed drops it. Each with a sigma of its own."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    first = [p for name, p in named.items() if "fc1" in name]
    rest = [p for name, p in named.items() if "fc1" not in name]
    return [{"params": []}, {"params": first, "sigma": 0.1}, {"params": rest, "sigma": 0.3}]


def batch_of(step: int, micro: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return mlp_batch(100 * step + 10 * micro + dist.get_rank(), dtype)


def loss_of(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x).float(), y)


def config_of(stage: int, dtype: torch.dtype, offload: bool = False) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": WINDOW,
        "zero_optimization": {
            "stage": stage,
            **({"offload_optimizer": {"device": "cpu"}} if offload else {}),
        },
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }


def start(model: nn.Module, optimizer: Any, *kind: Any) -> Any:
    import deepspeed

    return deepspeed.initialize(model=model, optimizer=optimizer, config=config_of(*kind))[0]


def flat_engine(stage: int, dtype: torch.dtype, offload: bool) -> tuple[nn.Module, FlatLoRAOptimizer, Any]:
    model = lora_mlp(dtype).train()
    optimizer = FlatLoRAOptimizer(
        adamw(groups_of(model)), model, sigma=0.2, schedule="linear", total_steps=STEPS, seed=3
    )
    return model, optimizer, start(model, optimizer, stage, dtype, offload)


def with_deepspeed(stage: int, dtype: torch.dtype, offload: bool, folder: str) -> list[float]:
    model, optimizer, engine = flat_engine(stage, dtype, offload)
    assert optimizer.step_count == 0
    clean, losses = fingerprint(model), []

    def train(steps: range) -> Iterator[float]:
        for step in steps:
            for micro in range(WINDOW):
                batch = batch_of(step, micro, dtype)
                loss = loss_of(engine, batch)
                assert bool(changed_weights(model, clean)) == (step > 0)
                with torch.no_grad():
                    model.eval()
                    quiet = loss_of(engine, batch)
                    assert (quiet.item() != loss.item()) == (step > 0)
                    model.train()
                engine.backward(loss)
                if step == 2 and micro == 0:
                    weights = model.state_dict()
                    assert all(torch.equal(weights[n].view(v.dtype), v) for n, v in clean.items())
                engine.step()
                yield loss.item()
            assert optimizer.step_count == step + 1
            assert not changed_weights(model, clean)

    losses += train(range(2))
    engine.save_checkpoint(folder)
    losses += train(range(2, STEPS))
    weights = [p.detach().clone() for p in trainable(model)]

    model, optimizer, engine = flat_engine(stage, dtype, offload)
    clean = fingerprint(model)
    engine.load_checkpoint(folder)
    assert optimizer.step_count == 2
    assert list(train(range(2, STEPS))) == losses[2 * WINDOW :]
    assert all(torch.equal(p, q) for p, q in zip(trainable(model), weights, strict=True))
    return losses


def written_by_hand(stage: int, dtype: torch.dtype) -> list[float]:
    """In the explicit style, with float32 copies of the adapters."""
    model = lora_mlp(dtype).train()
    idle = torch.optim.SGD(groups_of(model), lr=1.0)  # it has no gradients when it steps
    noise = FlatLoRAOptimizer(
        idle, model, sigma=0.2, schedule="linear", total_steps=STEPS, seed=3, auto=False
    )
    pairs = [(p, p.detach().clone().float()) for p in trainable(model)]
    base = adamw([copy for _, copy in pairs])
    if stage == 0 and dtype == torch.bfloat16:
        for _, copy in pairs:
            copy.grad = torch.zeros_like(copy)
        base.step()  # so DeepSpeed creates the state
    losses = []
    for step in range(STEPS):
        with noise.perturbed():
            for micro in range(WINDOW):
                loss = loss_of(model, batch_of(step, micro, dtype))
                (loss / WINDOW).backward()
                losses.append(loss.item())
        for p, copy in pairs:
            assert p.grad is not None
            copy.grad, p.grad = p.grad.float(), None
            dist.all_reduce(copy.grad)
            copy.grad /= dist.get_world_size()
        base.step()
        with torch.no_grad():
            for p, copy in pairs:
                p.copy_(copy)
        noise.step()
    return losses


def set_up() -> None:
    os.environ.update(
        DS_ACCELERATOR="cpu",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",  # unused: the group is there already
        RANK=str(dist.get_rank()),
        LOCAL_RANK=str(dist.get_rank()),
        WORLD_SIZE=str(dist.get_world_size()),
    )
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)


def common_folder() -> str:
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    return folder[0]


def directly() -> dict[str, tuple[list[float], list[float]]]:
    set_up()
    return {
        f"ZeRO-{stage}, {dtype}, {offload=}": (
            with_deepspeed(stage, dtype, offload, common_folder()),
            written_by_hand(stage, dtype),
        )
        for stage, dtype, offload in KINDS
    }


@pytest.mark.parametrize("world", [1, 2])
def test_same_losses_as_by_hand_and_when_resumed(world: int) -> None:
    for rank, results in enumerate(launch(directly, world=world, timeout=280)):
        assert len(results) == len(KINDS)
        for kind, (found, expected) in results.items():
            # DeepSpeed sums the gradients of ranks and micro-batches in another order.
            tolerance = 0.0 if world == 1 else 1e-6 if "float32" in kind else 1e-3
            assert found == pytest.approx(expected, abs=tolerance, rel=0), (kind, rank)


def through_accelerate() -> dict[int, tuple[list[float], list[float]]]:
    set_up()
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState, GradientState

    results = {}
    for stage in (0, 1, 2):
        model = lora_mlp().train()
        optimizer = FlatLoRAOptimizer(
            adamw(groups_of(model)), model, sigma=0.2, schedule="linear", total_steps=STEPS, seed=3
        )
        plugin = DeepSpeedPlugin(hf_ds_config=config_of(stage, torch.float32))
        accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin, gradient_accumulation_steps=WINDOW)
        engine, wrapped = accelerator.prepare(model, optimizer)
        losses = []
        for step in range(STEPS):
            for micro in range(WINDOW):
                with accelerator.accumulate(engine):
                    loss = loss_of(engine, batch_of(step, micro, torch.float32))
                    accelerator.backward(loss)
                    wrapped.step()
                    wrapped.zero_grad()
                    losses.append(loss.item())
        assert optimizer.step_count == STEPS, (stage, optimizer.step_count)
        results[stage] = losses, written_by_hand(stage, torch.float32)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return results


@pytest.mark.parametrize("world", [1, 2])
def test_through_accelerate(world: int) -> None:
    for results in launch(through_accelerate, world=world, timeout=280):
        for stage, (found, expected) in results.items():
            assert found == pytest.approx(expected, abs=0.0 if world == 1 else 1e-6, rel=0), stage


def trainer_of(
    folder: str, stage: int | None, callback: Any, offload: dict[str, Any] | None = None, **options: Any
) -> tuple[Any, dict[str, Tensor]]:
    from transformers import Trainer, TrainingArguments

    class RecordingTrainer(Recording, Trainer):
        pass

    deepspeed = None
    if stage is not None:
        deepspeed = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": stage},
        }
    if deepspeed is not None and offload is not None:
        deepspeed = {**deepspeed, **offload}
        deepspeed["zero_optimization"] = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    model = tiny_model()
    arguments = TrainingArguments(
        folder,
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        optim="adamw_torch",
        logging_steps=2,
        save_strategy="steps",
        save_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        deepspeed=deepspeed,
    )
    trainer = RecordingTrainer(
        model,
        arguments,
        train_dataset=token_rows(32),
        callbacks=[] if callback is None else [callback],
        **options,
    )
    return trainer, fingerprint(model)


def through_transformers() -> dict[Any, list[float]]:
    set_up()
    from accelerate.state import AcceleratorState, GradientState

    from flatlora_optim.integrations.transformers import FlatLoRACallback

    def run(
        stage: int | None, folder: str, checkpoint: str | None = None, offload: Any = None
    ) -> list[float]:
        trainer, clean = trainer_of(folder, stage, FlatLoRACallback(sigma=0.1), offload)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert not changed_weights(trainer.model, clean)
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert all(entry["flatlora/noise_norm"] > 0 for entry in logged)
        optimizer = trainer.optimizer
        assert not [key for group in optimizer.param_groups for key in group if "flatlora" in key]
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        losses: list[float] = trainer.losses
        return losses

    results: dict[Any, list[float]] = {None: run(None, common_folder())}
    for stage in (0, 1, 2):
        folder = common_folder()
        results[stage] = run(stage, folder)
        resumed = run(stage, folder, f"{folder}/checkpoint-2")
        assert resumed == results[stage][4:]
    results["offloaded"] = run(2, common_folder(), offload={"zero_force_ds_cpu_optimizer": False})
    return results


@pytest.mark.parametrize("world", [1, 2])
def test_through_transformers(world: int) -> None:
    """The same callback, with DeepSpeed and without."""
    for results in launch(through_transformers, world=world, timeout=280):
        for stage in (0, 1, 2, "offloaded"):
            assert results[stage] == pytest.approx(results[None], abs=1e-5, rel=0), stage


def message_of(call: Any) -> str:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)
    raise AssertionError("nothing was raised")


def too_late() -> dict[str, str]:
    set_up()
    from accelerate.state import AcceleratorState, GradientState

    from flatlora_optim.integrations.transformers import FlatLoRACallback, attach

    def fresh(*arguments: Any, **options: Any) -> Any:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return trainer_of(common_folder(), 1, *arguments, **options)[0]

    messages = {}
    optimizer = flat_optimizer(tiny_model())
    trainer = fresh(FlatLoRACallback(optimizer), optimizers=(optimizer, None))
    messages["dropped"] = message_of(trainer.train)
    trainer = fresh(None)
    trainer.add_callback(FlatLoRACallback(sigma=0.1))
    messages["late"] = message_of(trainer.train)
    messages["exchanged"] = message_of(fresh(FlatLoRACallback(sigma=0.1), offload={}).train)
    trainer = fresh(None)
    attach(trainer, sigma=0.1, schedule="constant")
    trainer.train()
    assert all(entry["flatlora/noise_norm"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    messages["twice"] = message_of(trainer.train)

    model = lora_mlp()
    optimizer = FlatLoRAOptimizer(adamw(trainable(model)), model, sigma=0.1, schedule="constant")
    engine = start(model, optimizer, 3, torch.float32)
    messages["ZeRO-3"] = refusal(lambda: engine(mlp_batch()[0]))
    messages["in ZeRO-3"] = refusal(
        lambda: FlatLoRAOptimizer(adamw(trainable(model)), model, sigma=0.1, schedule="constant")
    )
    return messages


def test_what_can_not_be_is_reported() -> None:
    (messages,) = launch(too_late, world=1)
    assert "has dropped the FlatLoRAOptimizer and would train with AdamW" in messages["dropped"]
    assert "attach(trainer, sigma=...)" in messages["late"]
    assert '"zero_force_ds_cpu_optimizer": false' in messages["exchanged"]
    assert "build a new Trainer" in messages["twice"]
    for kind in ("ZeRO-3", "in ZeRO-3"):
        assert "ZeRO-3" in messages[kind]
        assert "fully_shard" in messages[kind]
