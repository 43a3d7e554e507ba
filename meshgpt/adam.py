"""Adam with its moments in any format, as a transformation of optax.

Where the formats have few bits, each device goes over its part of a parameter in chunks of rows, the update taking the
gradient's place: what is in float32 at a time is a chunk, never a whole state.
"""

import dataclasses
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from meshgpt.formats import Format, Layout, Packed, Part, Plain, over_parts
from meshgpt.trees import Tree, map_with_names, unzip

Moments: TypeAlias = tuple[Any, Any]


@dataclasses.dataclass(frozen=True)
class Adam:
    """m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  u = m' / (sqrt(v') + eps)   (Kingma and Ba 2015, algorithm 1)

    m' and v' are corrected for their start at 0, and u comes of them before they are rounded to their formats.
    """

    b1: float
    b2: float
    eps: float
    first: Format
    second: Format

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        """Its state is optax's, with `Blocked` and `Rank1` among the moments' leaves.

        `update` takes `finite`, a scalar: where it is False the state stays as it was.
        """
        return optax.GradientTransformationExtraArgs(self.init, cast(Any, self.update))

    def init(self, params: Tree) -> optax.ScaleByAdamState:
        def zeros(kept: Format) -> Tree:
            return map_with_names(lambda name, leaf: zero_moment(kept, name, leaf), params)

        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(self.first), zeros(self.second))

    def update(
        self, updates: Tree, state: optax.ScaleByAdamState, params: Tree | None = None, *, finite: jax.Array
    ) -> tuple[Tree, optax.ScaleByAdamState]:
        del params
        count = jnp.asarray(state.count) + 1
        t = count.astype(jnp.float32)
        corrections = 1 - jnp.float32(self.b1) ** t, 1 - jnp.float32(self.b2) ** t

        def one(name: str, g: jax.Array, mu: Any, nu: Any) -> tuple[jax.Array, Any, Any]:
            layout = packed_layout(self.first, name, g)
            if layout is None:
                return self._whole(g, mu, nu, corrections, finite)
            return self._on_mesh(layout, g, mu, nu, corrections, finite)

        rows = map_with_names(one, updates, state.mu, state.nu)
        new, mu, nu = unzip(updates, rows, 3)
        return new, optax.ScaleByAdamState(jnp.where(finite, count, state.count), mu, nu)

    def _whole(self, g: jax.Array, mu: jax.Array, nu: jax.Array, corrections: Moments, finite: jax.Array) -> Any:
        m, v = self._moments(*(x.astype(jnp.float32) for x in (g, mu, nu)))
        kept = jnp.where(finite, m.astype(mu.dtype), mu), jnp.where(finite, v.astype(nu.dtype), nu)
        return self._direction(m, v, corrections).astype(g.dtype), *kept

    def _on_mesh(self, layout: Layout, g: jax.Array, mu: Any, nu: Any, corrections: Moments, finite: jax.Array) -> Any:
        assert not isinstance(self.first, Plain)
        assert not isinstance(self.second, Plain)
        first, second = self.first, self.second

        def local(g: jax.Array, mu: Any, nu: Any, corrections: Moments, finite: jax.Array) -> Any:
            arrays = jax.tree.map(layout.matrices, (g, mu, nu))
            new = self._in_parts(layout, first, second, arrays, corrections, finite)
            return jax.tree.map(lambda a, like: a.reshape(like.shape), new, (g, mu, nu))

        if not layout.mesh:
            return local(g, mu, nu, corrections, finite)
        specs = PartitionSpec(*layout.spec), first.specs(layout), second.specs(layout)
        scalar = PartitionSpec()
        mapped = jax.shard_map(local, in_specs=(*specs, (scalar, scalar), scalar), out_specs=specs, check_vma=False)
        return mapped(g, mu, nu, corrections, finite)

    def _in_parts(
        self, layout: Layout, first: Packed, second: Packed, arrays: Any, corrections: Moments, finite: jax.Array
    ) -> Any:
        """One device's gradient and moments, each array as (G, R, X): the update in the gradient's place, and they."""
        shape = arrays[0].shape

        def squares(part: Part) -> jax.Array:
            g_RC, _, nu = jax.tree.map(part.read, arrays)
            v_RC = second.decode(layout, nu)
            return self._moments(g_RC.astype(jnp.float32), v_RC, v_RC)[1]

        survey = second.survey(layout, shape, squares)

        def new(g_RC: jax.Array, mu: Any, nu: Any, survey: Any) -> Any:
            m_RC, v_RC = first.decode(layout, mu), second.decode(layout, nu)
            m_RC, v_RC = self._moments(g_RC.astype(jnp.float32), m_RC, v_RC)
            u_RC = self._direction(m_RC, v_RC, corrections).astype(g_RC.dtype)
            return u_RC, first.encode(layout, m_RC, mu, None), second.encode(layout, v_RC, nu, survey)

        def body(part: Part, carry: Any) -> Any:
            pieces = *jax.tree.map(part.read, carry), jax.tree.map(part.read, survey)
            # Besides skipping, the branch ends XLA's fusion: all is read before anything is written to its place, which
            # otherwise would be copied whole.
            pieces = jax.lax.cond(finite, new, lambda g, mu, nu, survey: (g, mu, nu), *pieces)
            return jax.tree.map(part.write, carry, pieces)

        g, mu, nu = over_parts(shape, body, arrays)
        return g, mu, second.finish(nu, survey, finite)

    def _moments(self, g: jax.Array, m: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.b1 * m + (1 - self.b1) * g, self.b2 * v + (1 - self.b2) * jnp.square(g)

    def _direction(self, m: jax.Array, v: jax.Array, corrections: Moments) -> jax.Array:
        return (m / corrections[0]) / (jnp.sqrt(v / corrections[1]) + self.eps)


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
