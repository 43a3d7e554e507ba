"""meshgpt trains GPT-2 and GPT-J language models with JAX: the same recipe on a laptop CPU, one GPU, or a TPU pod.

What it offers from Python is listed in `__all__` and described in `meshgpt.api`; a name is imported when it is used, so
that `import meshgpt` takes no time. Type checkers read `__init__.pyi`.
"""

# pyright: reportUnsupportedDunderAll=false
import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "api": ("LanguageModel", "TrainedRun", "load", "prepare"),
    "checkpoint.manager": ("Checkpointing",),
    "config": ("Data", "Evals", "Run", "Samples"),
    "distributed.mesh": ("MeshShape",),
    "errors": ("MachineError", "UserError"),
    "models.model": ("GPT2Config", "GPTJConfig"),
    "optim.config": ("AdamW",),
    "training.callbacks": ("Callback",),
}

__all__ = [
    "AdamW", "Callback", "Checkpointing", "Data", "Evals", "GPT2Config", "GPTJConfig", "LanguageModel", "MachineError",
    "MeshShape", "Run", "Samples", "TrainedRun", "UserError", "load", "prepare", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "train":  # the module of the command, which is the function too
        return importlib.import_module("meshgpt.train")
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'meshgpt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"meshgpt.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
