"""PyTorch's `pytorch_model.bin`, read without ever unpickling anything but tensors.

`torch.load(weights_only=True)` builds tensors and plain containers and refuses every other name that a pickle calls.
"""

import dataclasses
import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from meshgpt.errors import UserError

if TYPE_CHECKING:
    import torch

_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of `file`. `held` is the tensor itself in files of before PyTorch 1.6, which cannot be mapped."""

    file: Path
    name: str
    code: str
    shape: tuple[int, ...]
    held: "torch.Tensor | None" = None

    def map(self) -> np.ndarray:
        """The tensor, memory-mapped for as long as the array lives."""
        # The file is opened anew each time, so that the pages of tensors that are done with are given back.
        return _numpy(_load(self.file)[self.name] if self.held is None else self.held)


def read_header(file: Path) -> dict[str, Entry]:
    """Every tensor in `file`.

    Raises:
      UserError: PyTorch is not installed, the file is cut short, or it holds anything but tensors.
    """
    tensors = _load(file)
    mapped = zipfile.is_zipfile(file)
    return {
        name: Entry(
            file=file, name=name, code=_code(tensor), shape=tuple(tensor.shape), held=None if mapped else tensor
        )
        for name, tensor in tensors.items()
    }


def _load(file: Path) -> "dict[str, torch.Tensor]":
    torch = _torch(file)
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} is broken or holds more than tensors; refused, and nothing in it was run. "
            f"Take the model's .safetensors instead. PyTorch says: {_first_line(error)}"
        ) from error
    except Exception as error:  # whatever the library raises for bytes that it cannot parse
        raise UserError(
            f"{file} is cut short or is not a file of PyTorch's; download it again ({_first_line(error)})"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds a {type(found).__name__}, not a table of tensors; refused")
    for name, tensor in found.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_quantized
        if not plain or not isinstance(name, str):
            raise UserError(f"{file} holds {name!r}, a {type(tensor).__name__} that is not a plain tensor; refused")
    return found


def _torch(file: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{file} is in PyTorch's own format, and PyTorch is not installed: pip install torch, "
            "or take the model's .safetensors"
        ) from error
    return torch


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def _code(tensor: "torch.Tensor") -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return _CODES.get(name, name)


def _numpy(tensor: "torch.Tensor") -> np.ndarray:
    tensor = tensor.detach()
    if _code(tensor) == "BF16":  # which NumPy does not know by itself
        import torch

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
