"""A parameter that is stacked over layers: allocated once on its devices and filled layer by layer, in place."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def stacked(
    shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding, read: Callable[[int, NamedSharding], jax.Array]
) -> jax.Array:
    """The stack of `shape` (layers first) of what `read` gives: the layer of a number, placed as it is told."""
    assert not sharding.spec or sharding.spec[0] is None, f"layers are sharded: {sharding.spec}"
    of_one_layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    stack = jnp.zeros(shape, dtype, device=sharding)
    for layer in range(shape[0]):
        # Waited for, or the host runs ahead and holds the parts of many layers.
        stack = jax.block_until_ready(_set_layer(stack, read(layer, of_one_layer), layer))
    return stack


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, part: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, part, layer, 0)
