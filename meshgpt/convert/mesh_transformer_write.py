"""Our parameters back in the layout of Mesh-Transformer-JAX, streamed leaf by leaf; see `mtj` for the layout."""

import contextlib
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from meshgpt import trees
from meshgpt.convert import mesh_transformer_read
from meshgpt.convert.adam_state import Moments
from meshgpt.convert.atomic_folder import first, staged
from meshgpt.convert.gather import live_tensors
from meshgpt.convert.hf_names import stored_tensors
from meshgpt.convert.safetensor import DTYPES
from meshgpt.convert.verify import compare_tensors
from meshgpt.distributed import processes
from meshgpt.errors import UserError
from meshgpt.models.gptj import GPTJConfig
from meshgpt.settings import json_text


def export_mtj(
    params: trees.Tree,
    config: GPTJConfig,
    out: Path,
    *,
    shards: int = 8,
    step: int = 0,
    moments: Moments | None = None,
    replace: bool = False,
) -> None:
    """Writes `out` (usually `.../step_N`) as a checkpoint that Mesh-Transformer-JAX and its tools read, in float32.

    The embedding gets a bias of zeros; the bias of `fc_out` is split evenly over the shards. What is written is read
    again and compared, tensor by tensor, before `out` gets its name. Every process of a run calls this.

    Args:
      params: the parameter tree, on any mesh.
      shards: model-parallel shards, a power of two that divides the heads and the vocabulary.
      moments: Adam's state; without it the checkpoint is a "slim" one.

    Raises:
      UserError: the shards do not divide the model, `out` is taken, the disk is too small, or a value is not finite.
    """
    _check(config, shards)
    copies = 1 if moments is None else 3
    total = 4 * copies * sum(math.prod(tensor.shape) for tensor in stored_tensors(config))
    count = copies * (len(mesh_transformer_read.places(config.n_layers)) + 1)
    with staged(out, total, marker=mesh_transformer_read.SETTINGS, replace=replace) as folder:
        leaves = _leaves(params, config, shards, step, moments)
        if first():
            _write(folder, leaves, count, shards)
            (folder / mesh_transformer_read.SETTINGS).write_text(json_text(_settings(config, shards), indent=2) + "\n")
        else:
            for _ in leaves:  # takes part in the gathering
                pass
        processes.meet()
        found = mesh_transformer_read.read(folder)
        compare_tensors(found.tensors, params, config)
        if moments is not None and found.adam is not None:
            compare_tensors(found.adam.mu, moments.mu, config)
            compare_tensors(found.adam.nu, moments.nu, config)


def _check(config: GPTJConfig, shards: int) -> None:
    if shards < 1 or shards & (shards - 1):
        raise UserError(f"shards={shards}: give a power of two, such as 8")
    for name, size in (("n_heads", config.n_heads), ("vocab_size", config.vocab_size)):
        if size % shards:
            raise UserError(f"{shards} shards do not divide {name}={size}: use fewer, or resize it on import")
    if config.tied_head:
        raise UserError("Mesh-Transformer-JAX has a head of its own, and this model's is its embedding")
    if config.mlp_width != 4 * config.d_model or config.layer_norm_eps != 1e-5:
        raise UserError(
            f"Mesh-Transformer-JAX knows only d_ff = 4 d_model and layer_norm_eps = 1e-5; "
            f"this model has {config.mlp_width} and {config.layer_norm_eps}"
        )


def _leaves(
    params: trees.Tree, config: GPTJConfig, shards: int, step: int, moments: Moments | None
) -> Iterator[list[np.ndarray]]:
    """Every leaf in the order of the files, as its part for each shard."""
    if moments is not None:
        count = [np.array(moments.count, np.int32)] * shards
        yield count
        yield from _split(moments.mu, config, shards, moments=True)
        yield from _split(moments.nu, config, shards, moments=True)
        yield count  # of the schedule
    yield from _split(params, config, shards, moments=False)
    yield [np.array(step, np.int32)] * shards


def _split(tree: trees.Tree, config: GPTJConfig, shards: int, *, moments: bool) -> Iterator[list[np.ndarray]]:
    table = mesh_transformer_read.places(config.n_layers)
    stored = {tensor.name: tensor for tensor in stored_tensors(config)}
    wanted = [stored[place.tensor] for place in table if not place.is_embedding_bias]
    contents = live_tensors(tree, config, DTYPES["F32"], wanted)
    for place in table:
        if place.is_embedding_bias:
            yield [np.zeros(config.d_model, np.float32)] * shards
            continue
        array = next(contents)[1]
        matrix = array if place.is_embedding else array.T
        yield _parts(place, matrix, shards, moments=moments)


def _parts(place: mesh_transformer_read.Place, matrix: np.ndarray, shards: int, *, moments: bool) -> list[np.ndarray]:
    if place.join in ("rows", "columns"):
        return np.split(matrix, shards, axis=0 if place.join == "rows" else -1)
    if place.join == "first":
        # Untouched, as in training there: its loader takes copies that changed for parts of a sum.
        unused = np.full_like(matrix, 1.0 if place.name == "scale" and not moments else 0.0)
        return [matrix] + [unused] * (shards - 1)
    return [matrix if moments else matrix / np.float32(shards)] * shards


def _write(folder: Path, leaves: Iterator[list[np.ndarray]], count: int, shards: int) -> None:
    for shard in range(shards):
        (folder / f"shard_{shard}").mkdir()
    size, more = divmod(count, mesh_transformer_read.FILES)
    for number in range(mesh_transformer_read.FILES):
        with contextlib.ExitStack() as stack:
            files = [folder / f"shard_{shard}" / f"{number}.npz" for shard in range(shards)]
            archives = [stack.enter_context(zipfile.ZipFile(file, "x")) for file in files]
            for index in range(size + (number < more)):
                for archive, part in zip(archives, next(leaves), strict=True):
                    with archive.open(f"arr_{index}.npy", "w", force_zip64=True) as stream:
                        np.lib.format.write_array(stream, part, allow_pickle=False)
    assert next(leaves, None) is None, "leaves are left over"


def _settings(config: GPTJConfig, shards: int) -> dict[str, int | str]:
    """The part of a training configuration of Mesh-Transformer-JAX that says what the model is."""
    return {
        "layers": config.n_layers,
        "d_model": config.d_model,
        "n_heads": config.n_heads,
        "n_vocab": config.vocab_size,
        "norm": "layernorm",
        "pe": "rotary",
        "pe_rotary_dims": config.rotary_dim,
        "seq": config.n_positions,
        "cores_per_replica": shards,
    }
