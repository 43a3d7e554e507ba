"""A folder in the Hugging Face format as a table of tensors, whatever the files they lie in."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from meshgpt.errors import UserError
from meshgpt.hf import safetensor
from meshgpt.hf.names import canonical

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The tensors of a checkpoint by canonical name (`transformer.h.0...`, `lm_head...`), none of them read yet."""

    folder: Path
    entries: dict[str, safetensor.Entry]

    def map(self, name: str) -> np.ndarray:
        """One tensor, memory-mapped for as long as the array lives."""
        return self.entries[name].map()


def open_source(folder: Path) -> Source:
    """The tensors of the checkpoint in `folder`: `model.safetensors`, or the shards that its index names.

    Raises:
      UserError: for no checkpoint, a file that is missing, cut short or elsewhere, and a tensor that is there twice.
    """
    entries: dict[str, safetensor.Entry] = {}
    for file in _files(folder):
        for name, entry in safetensor.read_header(file).items():
            if canonical(name) in entries:
                raise UserError(f"{folder}: tensor {canonical(name)} is there twice, in {entry.file.name} for one")
            entries[canonical(name)] = entry
    return Source(folder=folder, entries=entries)


def _files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} has no model: neither {SINGLE} nor {INDEX}")
    return indexed_files(folder / INDEX)


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
