"""A folder in the Hugging Face format as a table of tensors, whatever the files they lie in."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from meshgpt.convert import safetensor, torch_bin
from meshgpt.convert.hf_names import canonical
from meshgpt.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_SINGLE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"


class Entry(Protocol):
    """One tensor of a checkpoint, not read yet."""

    @property
    def code(self) -> str:
        """Its dtype as safetensors names it; only those in `safetensor.DTYPES` can be read."""
        ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def map(self) -> np.ndarray:
        """The contents, memory-mapped where the format allows; the memory lasts as long as the array."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensors:
    """The tensors of a checkpoint by canonical name (`transformer.h.0...`, `lm_head...`), none of them read yet.

    origin: the folder, for messages.
    """

    origin: str
    entries: Mapping[str, Entry]


def open_tensors(folder: Path) -> Tensors:
    """The tensors of the checkpoint in `folder`: safetensors before pytorch_model.bin, one file or what an index names.

    Raises:
      UserError: for no checkpoint, a file that is missing, cut short, elsewhere or not of tensors, and a tensor that is
        there twice.
    """
    entries: dict[str, Entry] = {}
    for file in _files(folder):
        for name, entry in _read_header(file).items():
            if canonical(name) in entries:
                raise UserError(f"{folder}: tensor {canonical(name)} is there twice, in {file.name} for one")
            entries[canonical(name)] = entry
    return Tensors(origin=str(folder), entries=entries)


def _read_header(file: Path) -> Mapping[str, Entry]:
    if file.suffix == ".safetensors":
        return safetensor.read_header(file)
    if file.suffix == ".bin":
        return torch_bin.read_header(file)
    raise UserError(f"{file} is neither .safetensors nor .bin")


def _files(folder: Path) -> list[Path]:
    for single, index in ((SINGLE, INDEX), (TORCH_SINGLE, TORCH_INDEX)):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return indexed_files(folder / index)
    raise UserError(
        f"{folder} has no model: none of {SINGLE}, {INDEX}, {TORCH_SINGLE} and {TORCH_INDEX} (the formats of "
        "TensorFlow and Flax are not read: save the model with PyTorch first)"
    )


def indexed_files(index: Path) -> list[Path]:
    """The files that the `weight_map` of an index names, each of them in the folder of the index."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of tensors ({type(error).__name__}: {error})") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{index} names {name!r}, which is not a file of its own folder; refused")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(f"{index} names files that are missing: {', '.join(missing)}; download them again")
    return [index.parent / name for name in names]
