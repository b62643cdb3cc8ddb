"""Plug-ins of trainers whose packages need other versions than ours: against classes of the same structure.

``make test-trainers`` runs them in the trainers themselves.
"""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from common import Watch, adapter, identical, tiny_model, token_batches, token_rows
from test_hf_callback import RecordingTrainer, arguments, assert_gone, by_hand


def module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """A package that is not installed here."""
    for end in range(1, name.count(".") + 2):
        part = ".".join(name.split(".")[:end])
        if part not in sys.modules:
            monkeypatch.setitem(sys.modules, part, ModuleType(part))
    for key, value in members.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)


def forget(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delitem(sys.modules, f"flatlora_optim.integrations.{name}", raising=False)


def trained(folder: Path, callbacks: list[Any], trainer_class: type[Trainer] = RecordingTrainer) -> Any:
    model = tiny_model()
    watch = Watch(model)
    trainer = trainer_class(model, arguments(folder), train_dataset=token_rows(14), callbacks=callbacks)
    trainer.train()
    assert {("train", True), ("backward", True)} <= set(watch.uses)
    assert watch.is_clean()
    assert_gone(trainer)
    return trainer


class Config(dict[str, Any]):
    """As axolotl's: a missing key reads as None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


def test_axolotl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class BasePlugin:
        pass

    module(monkeypatch, "axolotl.integrations.base", BasePlugin=BasePlugin)
    forget(monkeypatch, "axolotl")
    from flatlora_optim.integrations import axolotl

    plugin = axolotl.FlatLoRAPlugin()
    where, _, name = plugin.get_input_args().rpartition(".")
    assert where == axolotl.__name__
    parsed = getattr(axolotl, name)(flatlora_sigma=0.1, flatlora_options={"schedule": "cosine"})
    cfg = Config(parsed.model_dump())
    plugin.register(cfg)
    assert "lora_mlp_kernel" not in cfg  # axolotl decides
    trainer = trained(tmp_path, plugin.add_callbacks_pre_trainer(cfg, None))
    losses, weights = by_hand(trainer.windows.values())
    assert trainer.losses == losses
    assert identical(adapter(trainer.model), weights)

    assert plugin.add_callbacks_pre_trainer(Config(), None) == []
    cfg = Config(flatlora_sigma=0.1, adapter="qlora", load_in_4bit=True)
    plugin.register(cfg)
    assert cfg.lora_mlp_kernel is False
    with pytest.raises(ValueError, match=r"lora_o_kernel: axolotl's fused"):
        plugin.register(Config(flatlora_sigma=0.1, adapter="qlora", lora_o_kernel=True))


def test_swift(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    callbacks_map: dict[str, Any] = {}
    module(monkeypatch, "swift.callbacks", callbacks_map=callbacks_map)
    from flatlora_optim.integrations import swift

    class SwiftTrainer(RecordingTrainer):
        def __init__(self, model: nn.Module, args: Any, callbacks: Any, **kwargs: Any) -> None:
            made = [callbacks_map[name](args, self) for name in callbacks]  # as ms-swift's mixin does
            super().__init__(model, args, callbacks=made, **kwargs)

    swift.register(sigma=0.1)
    trainer = trained(tmp_path, ["flatlora"], SwiftTrainer)
    assert trainer.losses == by_hand(trainer.windows.values())[0]
    with pytest.raises(TypeError, match="no option shedule"):
        swift.register(sigma=0.1, shedule="linear")


def test_llama_factory(tmp_path: Path) -> None:
    from flatlora_optim.integrations.transformers import FlatLoRACallback

    def run_exp(args: Any, callbacks: list[Any]) -> Any:
        """LLaMA-Factory appends its own callbacks, and hands the list to a Trainer."""
        return trained(tmp_path, callbacks)

    trainer = run_exp({}, callbacks=[FlatLoRACallback(sigma=0.1)])
    assert trainer.losses == by_hand(trainer.windows.values())[0]


class LoRALinear(nn.Module):
    """As torchtune's."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2, alpha: float = 4.0) -> None:
        super().__init__()
        self.rank, self.alpha, self.disabled = rank, alpha, False
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / 4, requires_grad=False)
        self.lora_a = nn.Linear(inputs, rank, bias=False)
        self.lora_b = nn.Linear(rank, outputs, bias=False)

    def adapter_params(self) -> list[str]:
        return ["lora_a.weight", "lora_b.weight"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = nn.functional.linear(x, self.weight)
        return out if self.disabled else out + (self.alpha / self.rank) * self.lora_b(self.lora_a(x))


class TuneRecipe:
    """The life of torchtune's ``LoRAFinetuneRecipeSingleDevice``."""

    def __init__(self, cfg: Any) -> None:
        self.losses: list[float] = []

    def setup(self, cfg: Any) -> None:
        torch.manual_seed(0)
        self._model = nn.Sequential(LoRALinear(6, 8), nn.Tanh(), LoRALinear(8, 1))
        self.clean = [m.weight.clone() for m in self._model if isinstance(m, LoRALinear)]
        self._optimizer = self._setup_optimizer(cfg_optimizer=None, opt_state_dict=cfg.state)
        self._lr_scheduler = self._setup_lr_scheduler(
            cfg_lr_scheduler=None, num_training_steps=6, last_epoch=cfg.first - 1
        )

    def _setup_optimizer(self, cfg_optimizer: Any, opt_state_dict: Any = None) -> Any:
        optimizer = torch.optim.AdamW(self._model.parameters(), lr=0.01)
        if opt_state_dict:
            optimizer.load_state_dict(opt_state_dict)
        return optimizer

    def _setup_lr_scheduler(self, cfg_lr_scheduler: Any, num_training_steps: int, last_epoch: int) -> Any:
        for group in self._optimizer.param_groups:
            group.setdefault("initial_lr", 0.01)
        return torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: 1 - step / 6, last_epoch)

    def train(self, steps: range) -> None:
        for step in steps:
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
            loss = self._model(x).square().mean()
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._lr_scheduler.step()
            self.losses.append(loss.item())

    def is_clean(self) -> bool:
        layers = [m for m in self._model if isinstance(m, LoRALinear)]
        return all(torch.equal(m.weight, clean) for m, clean in zip(layers, self.clean, strict=True))


class TuneConfig(SimpleNamespace):
    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


def test_torchtune() -> None:
    from flatlora_optim import FlatLoRAOptimizer
    from flatlora_optim.integrations.torchtune import FlatLoRARecipe

    class Recipe(FlatLoRARecipe, TuneRecipe):
        pass

    def started(**options: Any) -> Any:
        cfg = TuneConfig(**{"flatlora": {"sigma": 0.2}, "seed": 3, "state": None, "first": 0, **options})
        recipe = Recipe(cfg)
        recipe.setup(cfg)
        return recipe

    recipe = started()
    recipe.train(range(3))
    assert recipe.is_clean()
    state = {k: v.clone() for k, v in recipe._model.state_dict().items()}
    saved = torch.load(_written(recipe._optimizer.state_dict()), weights_only=True)
    recipe.train(range(3, 6))

    resumed = started(state=saved, first=3)
    resumed._model.load_state_dict(state)
    resumed.train(range(3, 6))
    assert resumed.losses == recipe.losses[3:]

    plain = TuneRecipe(None)
    plain.setup(TuneConfig(state=None, first=0))
    optimizer = FlatLoRAOptimizer(
        torch.optim.AdamW(plain._model.parameters(), lr=0.01), plain._model, sigma=0.2, total_steps=6, seed=3
    )
    plain._optimizer = optimizer
    plain._lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 6)
    plain.train(range(6))
    assert plain.losses == recipe.losses


def _written(value: Any) -> Any:
    import io

    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_composer(monkeypatch: pytest.MonkeyPatch) -> None:
    class TimeUnit:
        BATCH, EPOCH = "ba", "ep"

    module(monkeypatch, "composer.core", Callback=object, State=SimpleNamespace, TimeUnit=TimeUnit)
    module(monkeypatch, "composer.loggers", Logger=object)
    forget(monkeypatch, "composer")
    from flatlora_optim.integrations.composer import FlatLoRACallback

    class State(SimpleNamespace):
        """Like Composer's, it makes a list of whatever the optimizers are set to."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, [value] if name == "optimizers" else value)

    model = tiny_model().train()
    watch = Watch(model)
    base = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    state = State(
        model=model,
        max_duration=SimpleNamespace(unit="ep", value=2),
        dataloader_len=SimpleNamespace(value=3),
        timestamp=SimpleNamespace(batch=SimpleNamespace(value=0)),
    )
    state.optimizers = base
    logged: list[dict[str, float]] = []
    logger: Any = SimpleNamespace(log_metrics=logged.append)
    callback = FlatLoRACallback(sigma=0.1, log_interval=2)
    callback.before_load(state, logger)
    callback.fit_start(state, logger)
    assert callback.optimizer is not None
    assert callback.optimizer.total_steps == 6
    for step, batch in enumerate(token_batches(6)):
        state.timestamp.batch.value = step
        callback.batch_start(state, logger)
        model(**batch).loss.backward()
        state.optimizers[0].step()
        state.optimizers[0].zero_grad()
        callback.batch_end(state, logger)
    callback.fit_end(state, logger)
    assert {("train", True), ("backward", True)} <= set(watch.uses)
    assert watch.is_clean()
    assert state.optimizers == [base]
    assert len(logged) == 3
    assert all(entry["flatlora/noise_norm"] > 0 for entry in logged)
