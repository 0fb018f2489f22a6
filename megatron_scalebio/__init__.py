"""Learn how much each fine-tuning source should count, and train the model, at once.

    from megatron_scalebio import Trainer, open_run

    trainer = Trainer(open_run("FILE.yaml", ["bilevel.steps=100"]))
    trainer.train()
    print(trainer.weights)

Importing the package is light: what is behind these names is imported when one is first used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Config": "config",
    "Plan": "plan.planner",
    "Run": "run",
    "Trainer": "trainer",
    "UserError": "config",
    "load_config": "config",
    "open_config": "run",
    "open_run": "run",
}

__all__ = [*_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
