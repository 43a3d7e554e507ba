"""GPT-2 and GPT-J: the math, their parameters as a tree, and what of them is trained. No file, optimizer or loop."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshgpt.models.gpt2 import GPT2Config
    from meshgpt.models.gptj import GPTJConfig
    from meshgpt.models.layers import Execution
    from meshgpt.models.model import Model, ModelConfig
    from meshgpt.models.precision import Precision

__all__ = ["Execution", "GPT2Config", "GPTJConfig", "Model", "ModelConfig", "Precision"]

_MODULES = {
    "Execution": "layers",
    "GPT2Config": "gpt2",
    "GPTJConfig": "gptj",
    "Model": "model",
    "ModelConfig": "model",
    "Precision": "precision",
}


def __getattr__(name: str) -> Any:
    """Imports a name when it is asked for: `models.flops` and `models.bitsandbytes` need no JAX."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
