"""Adam with its moments in any format, as a transformation of optax.

Where the formats have few bits, each device goes over its part of a parameter in chunks of rows, the update taking the
gradient's place: what is in float32 at a time is a chunk, never a whole state.
"""

import dataclasses
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from meshgpt.distributed import host_memory
from meshgpt.optim.moments import Format, Layout, MomentCodec, Plain, RowChunk, over_chunks
from meshgpt.trees import Tree, map_with_names, unzip

_ROUNDING = 1.001  # what float32 may add to an update that is as large as Adam's can be


class AdamState(NamedTuple):
    """mu and nu: trees like the parameters, the first and second moments. count and nu_count: updates that they have
    seen, fewer where an optimizer without them came before."""

    count: jax.Array
    mu: Tree
    nu: Tree
    nu_count: jax.Array


class Corrections(NamedTuple):
    """What the moments of this step are divided by for their start at 0, and the largest update that they can give."""

    first: jax.Array
    second: jax.Array
    largest: jax.Array


@dataclasses.dataclass(frozen=True)
class Adam:
    """m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  u = m' / (sqrt(v') + eps)   (Kingma and Ba 2015, algorithm 1)

    m' and v' are corrected for their start at 0, and u comes of them before they are rounded to their formats.

    |u| is at most what it can be where both are sums over the same gradients (see `_largest`). In float32 that changes
    nothing. It holds where they are not: where m kept more of small gradients than v did, which in few bits it may, and
    where an optimizer without v came before (`switch`).
    """

    b1: float
    b2: float
    eps: float
    first: Format
    second: Format
    paged: bool = False  # the moments rest in the host's memory, and come to the device one parameter at a time

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        """Its state has `Blocked` and `Rank1` among the moments' leaves.

        `update` takes `finite`, a scalar: where it is False the state stays as it was.
        """
        return optax.GradientTransformationExtraArgs(self.init, cast(Any, self.update))

    def init(self, params: Tree) -> AdamState:
        def zeros(kept: Format) -> Tree:
            moments = map_with_names(lambda name, leaf: zero_moment(kept, name, leaf), params)
            return host_memory.to_host(moments) if self.paged else moments

        return AdamState(
            count=jnp.zeros((), jnp.int32),
            mu=zeros(self.first),
            nu=zeros(self.second),
            nu_count=jnp.zeros((), jnp.int32),
        )

    def update(
        self, updates: Tree, state: AdamState, params: Tree | None = None, *, finite: jax.Array
    ) -> tuple[Tree, AdamState]:
        del params
        counts = state.count + 1, state.nu_count + 1
        first, second = (count.astype(jnp.float32) for count in counts)
        corrections = self._corrections(first, second)

        def one(name: str, g: jax.Array, mu: Any, nu: Any) -> tuple[jax.Array, Any, Any]:
            layout = packed_layout(self.first, name, g)
            if layout is None:
                return self._whole(g, mu, nu, corrections, finite)
            return self._on_mesh(layout, g, mu, nu, corrections, finite)

        last: list[jax.Array] = []

        def in_turn(name: str, g: jax.Array, mu: Any, nu: Any) -> tuple[jax.Array, Any, Any]:
            # Without the barrier XLA would fetch all moments at once, and the first ones while activations are there.
            g, mu, nu, *last[:] = jax.lax.optimization_barrier((g, mu, nu, *last))
            new, mu, nu = one(name, g, host_memory.to_device(mu), host_memory.to_device(nu))
            last[:] = [new]
            return new, host_memory.to_host(mu), host_memory.to_host(nu)

        if self.paged:
            updates = jax.lax.optimization_barrier(updates)
        rows = map_with_names(in_turn if self.paged else one, updates, state.mu, state.nu)
        new, mu, nu = unzip(updates, rows, 3)
        count, nu_count = (jnp.where(finite, a, b) for a, b in zip(counts, (state.count, state.nu_count), strict=True))
        return new, AdamState(count, mu, nu, nu_count)

    def _corrections(self, first: jax.Array, second: jax.Array) -> Corrections:
        """Of moments that have seen so many gradients, this one among them."""
        start_1, start_2 = 1 - jnp.float32(self.b1) ** first, 1 - jnp.float32(self.b2) ** second
        return Corrections(start_1, start_2, self._largest(second))

    def _largest(self, count: jax.Array) -> jax.Array:
        """The largest |m'| / sqrt(v') of any `count` gradients.

        By Cauchy and Schwarz: m' = sum of a_k g_k and v' = sum of c_k g_k^2 have m'^2 <= v' * sum of a_k^2 / c_k, where
        a_k = (1 - b1) b1^k / (1 - b1^count), c_k likewise, and k = 0 is the newest. It is 1 for one gradient.
        """
        if self.b1 == 0 or self.b2 == 0:  # of a_k and c_k only the newest is left; without c_k there is no bound
            terms = jnp.float32(1.0 if self.b1 == 0 else jnp.inf)
        else:
            log_ratio = 2 * math.log(self.b1) - math.log(self.b2)
            # A sum of powers of b1^2 / b2; expm1, as the ratio may be near 1.
            terms = count if abs(log_ratio) < 1e-9 else jnp.expm1(count * log_ratio) / math.expm1(log_ratio)
        start_1, start_2 = 1 - jnp.float32(self.b1) ** count, 1 - jnp.float32(self.b2) ** count
        return _ROUNDING * (1 - self.b1) / start_1 * jnp.sqrt(start_2 / (1 - self.b2) * terms)

    def _whole(self, g: jax.Array, mu: jax.Array, nu: jax.Array, corrections: Corrections, finite: jax.Array) -> Any:
        m, v = self._moments(*(x.astype(jnp.float32) for x in (g, mu, nu)))
        kept = jnp.where(finite, m.astype(mu.dtype), mu), jnp.where(finite, v.astype(nu.dtype), nu)
        return self._direction(m, v, corrections).astype(g.dtype), *kept

    def _on_mesh(
        self, layout: Layout, g: jax.Array, mu: Any, nu: Any, corrections: Corrections, finite: jax.Array
    ) -> Any:
        assert not isinstance(self.first, Plain)
        assert not isinstance(self.second, Plain)
        first, second = self.first, self.second

        def local(g: jax.Array, mu: Any, nu: Any, corrections: Corrections, finite: jax.Array) -> Any:
            arrays = jax.tree.map(layout.matrices, (g, mu, nu))
            new = self._in_parts(layout, first, second, arrays, corrections, finite)
            return jax.tree.map(lambda a, like: a.reshape(like.shape), new, (g, mu, nu))

        if not layout.mesh:
            return local(g, mu, nu, corrections, finite)
        specs = PartitionSpec(*layout.spec), first.specs(layout), second.specs(layout)
        scalar = PartitionSpec()
        mapped = jax.shard_map(local, in_specs=(*specs, scalar, scalar), out_specs=specs, check_vma=False)
        return mapped(g, mu, nu, corrections, finite)

    def _in_parts(
        self, layout: Layout, first: MomentCodec, second: MomentCodec, arrays: Any, corrections: Corrections,
        finite: jax.Array,
    ) -> Any:  # fmt: skip
        """One device's gradient and moments, each array as (G, R, X): the update in the gradient's place, and they."""
        shape = arrays[0].shape

        def squares(chunk: RowChunk) -> jax.Array:
            g_RC, _, nu = jax.tree.map(chunk.read, arrays)
            v_RC = second.decode(layout, nu)
            return self._moments(g_RC.astype(jnp.float32), v_RC, v_RC)[1]

        stats = second.collect_stats(layout, shape, squares)

        def new(g_RC: jax.Array, mu: Any, nu: Any, stats: Any) -> Any:
            m_RC, v_RC = first.decode(layout, mu), second.decode(layout, nu)
            m_RC, v_RC = self._moments(g_RC.astype(jnp.float32), m_RC, v_RC)
            u_RC = self._direction(m_RC, v_RC, corrections).astype(g_RC.dtype)
            return u_RC, first.encode(layout, m_RC, mu, None), second.encode(layout, v_RC, nu, stats)

        def body(chunk: RowChunk, carry: Any) -> Any:
            pieces = *jax.tree.map(chunk.read, carry), jax.tree.map(chunk.read, stats)
            # Besides skipping, the branch ends XLA's fusion: all is read before anything is written to its place, which
            # otherwise would be copied whole.
            pieces = jax.lax.cond(finite, new, lambda g, mu, nu, stats: (g, mu, nu), *pieces)
            return jax.tree.map(chunk.write, carry, pieces)

        g, mu, nu = over_chunks(shape, body, arrays)
        return g, mu, second.finish(nu, stats, finite)

    def _moments(self, g: jax.Array, m: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.b1 * m + (1 - self.b1) * g, self.b2 * v + (1 - self.b2) * jnp.square(g)

    def _direction(self, m: jax.Array, v: jax.Array, corrections: Corrections) -> jax.Array:
        u = (m / corrections.first) / (jnp.sqrt(v / corrections.second) + self.eps)
        return jnp.clip(u, -corrections.largest, corrections.largest)


def packed_layout(kept: Format, name: str, leaf: jax.Array) -> Layout | None:
    """The parameter's matrices where `kept` keeps its moment in codes; None where it is a plain array."""
    layout = None if isinstance(kept, Plain) else Layout.of(name, leaf)
    return layout if layout is not None and layout.large else None


def zero_moment(kept: Format, name: str, leaf: jax.Array) -> Any:
    """The moment of parameter `leaf` before the first step."""
    if isinstance(kept, Plain):
        return jnp.zeros_like(leaf, jnp.dtype(kept.dtype))
    layout = packed_layout(kept, name, leaf)
    return jnp.zeros_like(leaf, jnp.float32) if layout is None else kept.zeros(layout)
