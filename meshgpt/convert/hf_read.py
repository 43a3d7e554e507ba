"""Import: every tensor of a Hugging Face folder checked, then streamed to its shards on the mesh.

Host memory beyond the parameters on the devices stays within one tensor of the file: a parameter that is stacked over
layers is allocated once on its devices and filled layer by layer, in place; each device reads its own slice of a
memory-mapped file.
"""

import math
import re
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from meshgpt import trees
from meshgpt.convert import bitsandbytes_read, phi, safetensor
from meshgpt.convert.hf_config import ModelConfig
from meshgpt.convert.hf_names import BUFFERS, Stored, by_path, from_stored, stored_tensors
from meshgpt.convert.stacking import stacked
from meshgpt.convert.tensors import Tensors, open_tensors
from meshgpt.errors import UserError
from meshgpt.models.gptj import GPTJConfig
from meshgpt.models.quantized import Place

_OF_THE_MODEL = re.compile(r"(transformer\.(wte|wpe|ln_f|h\.\d+)|lm_head|model)\.")


def load(folder: Path, config: ModelConfig, abstract: trees.Tree) -> trees.Tree:
    """The parameters in `folder`, which is in the Hugging Face format, placed like `abstract`; see `place_as_kept`."""
    return place_as_kept(fitting(open_tensors(folder), config), config, abstract)


def place_as_kept(tensors: Tensors, config: ModelConfig, abstract: trees.Tree) -> trees.Tree:
    """As `place`, but what bitsandbytes quantized stays in 4 or 8 bits: such leaves are `layers.Weight`s."""
    holders = by_path(stored_tensors(config))
    quantized = {
        path for path, held in holders.items() if isinstance(tensors.entries[held[0].name], bitsandbytes_read.LowBit)
    }
    return _placed(tensors, config, abstract, quantized)


def place(tensors: Tensors, config: ModelConfig, abstract: trees.Tree) -> trees.Tree:
    """The parameters that `tensors` hold, placed like `abstract`.

    Args:
      tensors: those of `config`, no more and no less (`fitting`).
      config: the architecture; its padded vocabulary is the one of `abstract`.
      abstract: the parameter tree as `jax.ShapeDtypeStruct` (arrays serve as well) with the dtype of every parameter,
        to which the source is cast, and its `NamedSharding`, which leaves the axis of layers whole. Where that is over
        an abstract mesh, the mesh that is set takes its place.

    Raises:
      UserError: naming the first tensor that holds a value that is not finite, in the file or once cast.
    """
    return _placed(tensors, config, abstract, set())


def _placed(tensors: Tensors, config: ModelConfig, abstract: trees.Tree, quantized: set[str]) -> trees.Tree:
    holders = by_path(stored_tensors(config))
    leaves = trees.leaves_with_names(abstract)
    assert {name for name, _ in leaves} == set(holders), "abstract is not a parameter tree of this configuration"
    # The largest tensors first: what the host holds of them is gone before the devices are full.
    order = sorted(leaves, key=lambda item: -math.prod(holders[item[0]][0].part_shape))
    placed = {
        name: (_place_low_bit if name in quantized else _place)(tensors, holders[name], name, leaf)
        for name, leaf in order
    }
    return trees.map_with_names(lambda name, _: placed[name], abstract)


def fitting(tensors: Tensors, config: ModelConfig) -> Tensors:
    """The tensors of `config`, without the constants and the copies that a checkpoint may carry along.

    Matrices that bitsandbytes quantized become one entry each, whose contents are dequantized (`bnb_read.plain`). A Phi
    becomes the GPT-J that it is (`phi.as_gptj`).

    Raises:
      UserError: listing all that is missing, unexpected, misshapen or of a dtype that is not a float's.
    """
    if isinstance(config, GPTJConfig) and phi.is_phi(tensors):
        return phi.as_gptj(_complete(tensors, phi.stored_tensors(config)), config)
    return _complete(bitsandbytes_read.plain(tensors, config), stored_tensors(config))


def heads_of_others(tensors: Tensors) -> list[str]:
    """Names of tensors beside the model proper: heads that other tools add, such as `v_head` and `score`."""
    return [name for name in tensors.entries if _OF_THE_MODEL.match(name) is None]


def _complete(tensors: Tensors, expected: list[Stored]) -> Tensors:
    wanted = {tensor.name: tensor.shape for tensor in expected}
    found = {name: entry for name, entry in tensors.entries.items() if BUFFERS.fullmatch(name) is None}
    if "lm_head.weight" in found and "lm_head.weight" not in wanted:
        _check_tied(tensors)
        del found["lm_head.weight"]
    problems = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in found]
    for name, entry in found.items():
        if name not in wanted:
            problems.append(f"unexpected: {name} {entry.shape}")
        elif entry.shape != wanted[name]:
            problems.append(f"shape: {name} is {entry.shape}, and the configuration says {wanted[name]}")
        elif entry.code not in safetensor.READ_DTYPES:
            problems.append(f"dtype: {name} is {entry.code}; supported: {', '.join(safetensor.READ_DTYPES)}")
    if problems:
        listed = "\n  ".join([f"{len(problems)} tensors do not fit its configuration:", *problems])
        others = [name for name in heads_of_others(tensors) if name in found]
        remedy = "\nheads that another tool added are left out by meshgpt import --ignore-extra" if others else ""
        raise UserError(f"{tensors.origin}: {listed}{remedy}")
    return Tensors(origin=tensors.origin, entries=found)


def _check_tied(tensors: Tensors) -> None:
    """A tied model may carry its head as a copy of the embedding; a head that differs is another model."""
    head, table = tensors.entries["lm_head.weight"], tensors.entries.get("transformer.wte.weight")
    same = (
        table is not None
        and (head.code, head.shape) == (table.code, table.shape)
        and head.code in safetensor.READ_DTYPES
    )
    if table is None or not same or not np.array_equal(head.map(), table.map()):
        raise UserError(
            f"{tensors.origin}: lm_head.weight differs from the embedding, yet the configuration ties them; "
            'if the head is its own, set "tie_word_embeddings": false in config.json'
        )


def _place(tensors: Tensors, holders: list[Stored], path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    sharding = _sharding(path, leaf)
    if holders[0].layer is None:
        return _read(tensors, holders[0], path, leaf.shape, sharding, leaf.dtype)

    def read(layer: int, of_one_layer: NamedSharding) -> jax.Array:
        return _read(tensors, holders[layer], path, leaf.shape[1:], of_one_layer, leaf.dtype)

    return stacked(leaf.shape, leaf.dtype, sharding, read)


def _place_low_bit(
    tensors: Tensors, holders: list[Stored], path: str, leaf: jax.ShapeDtypeStruct
) -> bitsandbytes_read.Weight4 | bitsandbytes_read.Weight8:
    sharding, axes = _sharding(path, leaf), trees.MatrixAxes.of(path, len(leaf.shape))
    assert axes is not None, f"{path} is not a matrix"
    assert isinstance(sharding.mesh, jax.sharding.Mesh), f"{path} is on no devices"
    inputs = axes.rows_end - axes.stack
    where = Place(shape=leaf.shape[1:], inputs=inputs, spec=PartitionSpec(*sharding.spec[1:]))
    entries = [tensors.entries[holder.name] for holder in holders]
    return bitsandbytes_read.assemble(entries, holders, path, where, sharding.mesh)


def _sharding(path: str, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    sharding = leaf.sharding
    assert isinstance(sharding, NamedSharding), f"{path} has no place on a mesh: {sharding}"
    if isinstance(sharding.mesh, AbstractMesh):  # as `jax.eval_shape` leaves it
        sharding = NamedSharding(jax.sharding.get_mesh(), sharding.spec)
    return sharding


def _read(
    tensors: Tensors, tensor: Stored, path: str, shape: tuple[int, ...], sharding: NamedSharding, dtype: np.dtype
) -> jax.Array:
    contents = tensors.entries[tensor.name].map()

    def slice_of(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        part = from_stored(tensor, contents, path, shape, index, dtype)
        if not np.isfinite(part).all():
            raise UserError(
                f"{tensors.origin}: {tensor.name} holds a value that is not finite in {np.dtype(dtype).name}"
            )
        return part

    return jax.make_array_from_callback(shape, sharding, slice_of)
