"""Export: the live parameters as a folder that transformers and its kin load, proved before it gets its name."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from meshgpt import trees
from meshgpt.convert import phi, safetensor
from meshgpt.convert.atomic_folder import first, staged
from meshgpt.convert.gather import live_tensors
from meshgpt.convert.hf_config import ModelConfig, config_json
from meshgpt.convert.hf_names import Stored, stored_tensors
from meshgpt.convert.json_file import write_json
from meshgpt.convert.tensors import INDEX, SINGLE
from meshgpt.convert.tokenizer import save_tokenizer, special_ids
from meshgpt.convert.verify import Probe, Verdict, read_back
from meshgpt.data.tokenizer import Tokenizer
from meshgpt.distributed import processes
from meshgpt.errors import UserError
from meshgpt.models.gptj import GPTJConfig

Dtype = Literal["float32", "bfloat16", "float16"]
Family = Literal["own", "phi"]

SHARD_BYTES = 5_000_000_000


def _silent(done: int, total: int) -> None:
    del done, total


def export(
    params: trees.Tree,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    out: Path,
    *,
    probe: Probe,
    dtype: Dtype = "float32",
    family: Family = "own",
    replace: bool = False,
    release: bool = False,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Callable[[int, int], None] = _silent,
) -> Verdict:
    """Writes `out` as a Hugging Face folder and proves it: `out` appears complete and compared, or not at all.

    Equal parameters give equal bytes. Host memory stays within one layer's tensor (or one table) and its copy in
    `dtype`. Every process of a run calls this; the first one writes, to a folder that all of them see.

    Args:
      params: the parameter tree, on any mesh.
      tokenizer: None leaves it out, and with it the ids that begin and end a text.
      probe: the tokens and the forward pass that the logits are compared with.
      family: the name that the model goes by: its own, or `phi`, under which GPT-J is known to more programs.
      replace: an earlier export at `out` gives way; anything else there is refused in any case.
      release: `params` are deleted once compared, so that the copy read back does not double the memory.
      shard_bytes: a larger model is cut into files of at most so many bytes, with an index.
      on_progress: called with bytes written and bytes in all.

    Raises:
      UserError: `out` is taken, the disk too small, a value not finite or too large for `dtype`, the saved tokenizer
        gives other ids, `family` is not for this model, or the folder read back differs from the live model (naming
        the first differing tensor).
    """
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids and the model {config.vocab_size:,}: "
            "export it with the tokenizer that it was trained with"
        )
    layout, target = _layout(config, family), _numpy(dtype)
    tensors = layout.tensors
    total = sum(_nbytes(tensor, target) for tensor in tensors)
    with staged(out, total, marker="config.json", replace=replace) as folder:
        shards = _plan(tensors, target, shard_bytes)
        _write_tensors(
            folder, shards, layout.contents(live_tensors(params, config, target)), target, total, on_progress
        )
        notes: tuple[str, ...] = ()
        if first():
            if len(shards) > 1:
                _write_index(folder, shards, total)
            write_json(folder / "config.json", layout.config_json(special_ids(tokenizer, config), dtype))
            notes = save_tokenizer(tokenizer, config, folder, probe.tokens_BT)
            if layout.note:
                notes = (layout.note, *notes)
                (folder / "README.md").write_text(f"# {out.name}\n\nFor whoever loads it: {layout.note}.\n", "utf-8")
        processes.meet()
        verdict = read_back(folder, params, config, probe, release=release)
        return dataclasses.replace(verdict, notes=notes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layout:
    """What a model is written as. contents: from the model's own tensors. config_json: of (special ids, dtype)."""

    tensors: list[Stored]
    contents: Callable[[Iterator[tuple[Stored, np.ndarray]]], Iterator[tuple[Stored, np.ndarray]]]
    config_json: Callable[[Mapping[str, Any], str], dict[str, Any]]
    note: str = ""


def _layout(config: ModelConfig, family: Family) -> _Layout:
    if family == "own":
        return _Layout(
            tensors=stored_tensors(config),
            contents=lambda found: found,
            config_json=lambda ids, dtype: config_json(config, ids, dtype),
        )
    if not isinstance(config, GPTJConfig):
        raise UserError("--as phi is for GPT-J, and this is a GPT-2, which every program knows: leave it out")
    return _Layout(
        tensors=phi.stored_tensors(config),
        contents=lambda found: phi.contents(found, config),
        config_json=lambda ids, dtype: phi.config_json(config, ids, dtype),
        note=phi.NOTE,
    )


def _numpy(dtype: Dtype) -> np.dtype:
    return safetensor.DTYPES[{"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]]


def _nbytes(tensor: Stored, dtype: np.dtype) -> int:
    return math.prod(tensor.shape) * dtype.itemsize


def _plan(tensors: list[Stored], dtype: np.dtype, shard_bytes: int) -> dict[str, list[Stored]]:
    """The tensors of each file, by its name."""
    groups: list[list[Stored]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = _nbytes(tensor, dtype)
        if groups[-1] and size + nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _write_tensors(
    folder: Path,
    shards: dict[str, list[Stored]],
    contents: Iterator[tuple[Stored, np.ndarray]],
    dtype: np.dtype,
    total: int,
    on_progress: Callable[[int, int], None],
) -> None:
    if not first():
        for _ in contents:  # takes part in the gathering
            pass
        return
    done = 0
    for file, members in shards.items():
        with safetensor.Writer(folder / file, [(tensor.name, tensor.shape) for tensor in members], dtype) as writer:
            for tensor, array in itertools.islice(contents, len(members)):
                writer.add(tensor.name, array)
                done += array.nbytes
                on_progress(done, total)


def _write_index(folder: Path, shards: dict[str, list[Stored]], total: int) -> None:
    weight_map = {tensor.name: file for file, members in shards.items() for tensor in members}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
