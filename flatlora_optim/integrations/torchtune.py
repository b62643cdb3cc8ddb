"""For torchtune's LoRA recipes. With ``flatlora: {sigma: 0.05}`` in the config::

    tune run flatlora_optim.integrations.torchtune --config CONFIG

does what ``tune run lora_finetune_single_device`` does, with Flat-LoRA.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from torch import nn

from ..optimizer import FlatLoRAOptimizer


class FlatLoRARecipe:
    """The first base class of a recipe, before one of torchtune's or your own::

        class Recipe(FlatLoRARecipe, LoRAFinetuneRecipeSingleDevice):
            pass

    The config's ``flatlora`` holds ``sigma`` and further options of :class:`.FlatLoRAOptimizer`.
    """

    _model: nn.Module
    _optimizer: FlatLoRAOptimizer

    def setup(self, cfg: Any) -> None:
        self._flatlora = {"seed": cfg.get("seed") or 0, **cfg.flatlora}
        super().setup(cfg)  # type: ignore[misc]

    def _setup_optimizer(self, *args: Any, **kwargs: Any) -> FlatLoRAOptimizer:
        optimizer = super()._setup_optimizer(*args, **kwargs)  # type: ignore[misc]
        return FlatLoRAOptimizer.adopt(optimizer, self._model, total_steps="deferred", **self._flatlora)

    def _setup_lr_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        # Only now does the recipe know the number of steps.
        self._optimizer.total_steps = kwargs["num_training_steps"]
        if kwargs["last_epoch"] >= 0:
            self._optimizer.step_count = kwargs["last_epoch"] + 1
        return super()._setup_lr_scheduler(*args, **kwargs)  # type: ignore[misc]


def load_recipe(name: str) -> Any:
    """The module of one of torchtune's recipes, which Python can't import by name.

    Args:
        name: The name that ``tune ls`` shows, such as ``"lora_finetune_single_device"``.
    """
    import torchtune

    path = Path(torchtune.__file__).parents[1] / "recipes" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _main() -> None:
    from torchtune import config

    base = load_recipe("lora_finetune_single_device").LoRAFinetuneRecipeSingleDevice
    recipe_class = type("Recipe", (FlatLoRARecipe, base), {})

    def run(cfg: Any) -> None:
        recipe = recipe_class(cfg=cfg)
        recipe.setup(cfg=cfg)
        recipe.train()
        recipe.cleanup()

    config.parse(run)()


if __name__ == "__main__":
    _main()
