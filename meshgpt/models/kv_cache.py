"""Attention with a cache of keys and values, for generation.

Legend: B rows, T new tokens a row, N heads, H head size, S slots of a cache, C cells: the heads of all rows.
"""

import dataclasses

import jax
import jax.numpy as jnp

from meshgpt.distributed.mesh import spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values that one layer has seen, (C, S, H) each; each device has the cells of its rows and heads.

    Rows and heads are one axis, as the matmuls take them. Apart, XLA writes the new slots twice, for the matmul and for
    the cache that stays, and has to copy the cache in between.
    """

    k_CSH: jax.Array
    v_CSH: jax.Array

    @staticmethod
    def empty(rows: int, heads: int, slots: int, head_size: int, dtype: jnp.dtype) -> "LayerCache":
        """Zeros on the mesh that is set."""

        def zeros() -> jax.Array:
            return jnp.zeros((rows * heads, slots, head_size), dtype, out_sharding=spec("cells _ _"))

        return LayerCache(zeros(), zeros())

    def of_rows(self, row_R: jax.Array, heads: int) -> "LayerCache":
        """The cache whose row r is row row_R[r] of this one, which is of so many heads."""
        local = heads // jax.sharding.get_abstract_mesh().shape["tensor"]

        def taken(cache_CSH: jax.Array) -> jax.Array:
            cache_BNSH = jax.shard_map(
                lambda c: c.reshape(-1, local, *c.shape[1:]), in_specs=spec("cells _ _"),
                out_specs=spec("batch heads _ _"),
            )(cache_CSH)  # fmt: skip
            cache_RNSH = cache_BNSH.at[row_R].get(out_sharding=spec("batch heads _ _"))
            return jax.shard_map(
                lambda c: c.reshape(-1, *c.shape[2:]), in_specs=spec("batch heads _ _"), out_specs=spec("cells _ _")
            )(cache_RNSH)

        return LayerCache(taken(self.k_CSH), taken(self.v_CSH))

    def lengthened(self, slots: int) -> "LayerCache":
        """With so many slots."""

        def padded(cache_CSH: jax.Array) -> jax.Array:
            return jnp.pad(cache_CSH, ((0, 0), (0, slots - cache_CSH.shape[1]), (0, 0)))

        return LayerCache(padded(self.k_CSH), padded(self.v_CSH))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Where the T tokens of a pass go in the caches, and what they see there.

    first: the slot of the first of them, the same in every row. seen_BTS: the slots that each looks at.
    """

    first: jax.Array
    seen_BTS: jax.Array


def attend_cached(
    q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, cache: LayerCache, slots: Slots
) -> tuple[jax.Array, LayerCache]:
    """`layers.attend` over the cache with the new keys and values in it, and that cache."""
    new, old = spec("batch seq heads _"), spec("cells _ _")
    attended = jax.shard_map(
        _attend, in_specs=(new, new, new, old, old, spec(""), spec("batch _ _")), out_specs=(new, old, old)
    )
    seen_BTS = jax.sharding.reshard(slots.seen_BTS, spec("batch _ _"))
    y_BTNH, k_CSH, v_CSH = attended(q_BTNH, k_BTNH, v_BTNH, cache.k_CSH, cache.v_CSH, slots.first, seen_BTS)
    return y_BTNH, LayerCache(k_CSH, v_CSH)


def _attend(
    q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, k_CSH: jax.Array, v_CSH: jax.Array, first: jax.Array,
    seen_BTS: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """On one device: its rows, its heads."""
    rows, length, heads, size = q_BTNH.shape

    def cells(x_BTNH: jax.Array) -> jax.Array:
        return x_BTNH.swapaxes(1, 2).reshape(rows * heads, length, size)

    k_CSH = jax.lax.dynamic_update_slice_in_dim(k_CSH, cells(k_BTNH), first, axis=1)
    v_CSH = jax.lax.dynamic_update_slice_in_dim(v_CSH, cells(v_BTNH), first, axis=1)
    q_CTH, seen_CTS = cells(q_BTNH * jnp.asarray(size**-0.5, q_BTNH.dtype)), jnp.repeat(seen_BTS, heads, axis=0)
    if rows == length == 1:  # XLA's CPU backend wants the larger operand first, of matrices and vectors only
        logits_CTS = jnp.einsum("CSH,CTH->CST", k_CSH, q_CTH, preferred_element_type=jnp.float32).swapaxes(1, 2)
    else:
        logits_CTS = jnp.einsum("CTH,CSH->CTS", q_CTH, k_CSH, preferred_element_type=jnp.float32)
    logits_CTS = jnp.where(seen_CTS, logits_CTS, jnp.finfo(jnp.float32).min)
    weights_CTS = jax.nn.softmax(logits_CTS, axis=-1).astype(q_BTNH.dtype)
    y_CTH = jnp.einsum("CTS,CSH->CTH", weights_CTS, v_CSH)
    return y_CTH.reshape(rows, heads, length, size).swapaxes(1, 2), k_CSH, v_CSH
