"""The stack of blocks: scanned or in line, recomputed in the backward pass or not, whole or in two parts.

Legend: as in `layers`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from meshgpt.distributed import host_memory
from meshgpt.models.layers import SAVED_NAMES, Execution, Remat

_POLICIES: dict[Remat, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "named": jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(SAVED_NAMES),
        offload_src="device",
        offload_dst=host_memory.KIND,
    ),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """A parameter stacked over layers, kept in two: the first layers' and the last ones'. `run_stack` takes it."""

    first: Any
    last: Any


class OfLayer(NamedTuple):
    """What differs from layer to layer beside the parameters: stacked, or of one layer. key: of its dropout."""

    key: jax.Array | None
    number: jax.Array | None


def run_stack(
    block: Callable[[Any, jax.Array, OfLayer], jax.Array],
    blocks: Any,
    x_BTD: jax.Array,
    key: jax.Array | None,
    layers: int,
    execution: Execution,
    *,
    numbered: bool = False,
) -> jax.Array:
    """x through `layers` blocks whose tensors are stacked on a leading axis: block(one_block, x, of_layer) -> x.

    Where they are `Parts`, the first go by themselves: no gradient passes them if none of theirs is asked for.
    `numbered`: the blocks ask for their number, from 0 on; otherwise it is None.
    """
    each = OfLayer(
        key=None if key is None else jax.random.split(key, layers), number=jnp.arange(layers) if numbered else None
    )
    if execution.remat == "offload":
        host_memory.require("execution.remat=offload", "take named, or full")
    done = 0
    for part in _parts(blocks):
        count = jax.tree.leaves(part)[0].shape[0]
        if not count:
            continue
        here = jax.tree.map(lambda stack, start=done, stop=done + count: stack[start:stop], each)
        x_BTD = _run_part(block, part, x_BTD, here, count, execution)
        done += count
    return x_BTD


def _run_part(
    block: Callable[[Any, jax.Array, OfLayer], jax.Array],
    blocks: Any,
    x_BTD: jax.Array,
    each: OfLayer,
    layers: int,
    execution: Execution,
) -> jax.Array:
    in_line = execution.unroll == 0 or execution.unroll >= layers
    if execution.remat != "none":
        block = jax.checkpoint(block, policy=_POLICIES[execution.remat], prevent_cse=in_line)
    if not in_line:

        def body(x: jax.Array, one: tuple[Any, OfLayer]) -> tuple[jax.Array, None]:
            return block(one[0], x, one[1]), None

        return jax.lax.scan(body, x_BTD, (blocks, each), unroll=execution.unroll)[0]
    for index, one in enumerate(unstack(blocks, layers)):
        x_BTD = block(one, x_BTD, jax.tree.map(lambda stack, index=index: stack[index], each))
    return x_BTD


def _parts(blocks: Any) -> list[Any]:
    """The stack, or the two that its `Parts` make."""

    def is_parts(leaf: Any) -> bool:
        return isinstance(leaf, Parts)

    leaves, structure = jax.tree.flatten(blocks, is_leaf=is_parts)
    if not any(map(is_parts, leaves)):
        return [blocks]
    return [structure.unflatten([leaf.first for leaf in leaves]), structure.unflatten([leaf.last for leaf in leaves])]


def unstack(blocks: Any, layers: int) -> list[Any]:
    """The single blocks of a stack. `lax.split`, whose transpose is one concatenation, not a sum of padded slices."""

    def parts(leaf: jax.Array) -> list[jax.Array]:
        return [jnp.squeeze(part, 0) for part in jax.lax.split(leaf, (1,) * layers)]

    leaves, structure = jax.tree.flatten(blocks)
    columns = [parts(leaf) for leaf in leaves]
    return [jax.tree.unflatten(structure, [column[index] for column in columns]) for index in range(layers)]
