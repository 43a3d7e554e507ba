"""Adafactor without momentum: the second moment of a matrix is kept as its rows' and columns' means."""

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from meshgpt.optim.moments import Layout
from meshgpt.trees import Tree, map_with_names, unzip


class FactoredState(NamedTuple):
    """count: updates so far. nu: a tree like the parameters, of `Factors` and, for vectors, float32 arrays."""

    count: jax.Array
    nu: Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """Means of squared gradients over a row (its axes kept, the columns' of length 1), and over a column."""

    rows: Any
    columns: Any


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Shazeer and Stern 2018, algorithm 4 (matrices: one layer's) with the decay rate of section 7.2:

    s = g^2 + eps;  b = 1 - t^-decay;  r = b r + (1 - b) row means of s;  c = b c + (1 - b) column means of s
    u = g / sqrt(r c / mean(r));  u = u / max(1, rms(u) / clip)
    """

    decay: float
    eps: float
    clip: float

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        """`update` takes `finite`, a scalar: where it is False the state stays as it was."""
        return optax.GradientTransformationExtraArgs(self.init, cast(Any, self.update))

    def init(self, params: Tree) -> FactoredState:
        def one(name: str, leaf: jax.Array) -> Any:
            layout, zeros = Layout.of(name, leaf), jnp.zeros_like(leaf, jnp.float32)
            return zeros if layout is None else Factors(*_means(layout, zeros))

        return FactoredState(jnp.zeros((), jnp.int32), map_with_names(one, params))

    def update(
        self, updates: Tree, state: FactoredState, params: Tree | None = None, *, finite: jax.Array
    ) -> tuple[Tree, FactoredState]:
        del params
        count = state.count + 1
        rate = 1 - count.astype(jnp.float32) ** -self.decay

        def one(name: str, g: jax.Array, nu: Any) -> tuple[jax.Array, Any]:
            layout, g32 = Layout.of(name, g), g.astype(jnp.float32)
            square = jnp.square(g32) + self.eps
            if layout is None:
                new = rate * nu + (1 - rate) * square
                u, axes = g32 * jax.lax.rsqrt(new), _one_tensor(name, g.ndim)
            else:
                means = zip((nu.rows, nu.columns), _means(layout, square), strict=True)
                new = Factors(*(rate * old + (1 - rate) * mean for old, mean in means))
                row_axes, column_axes = _groups(layout)
                scale = jax.lax.rsqrt(new.rows / new.rows.mean(row_axes, keepdims=True))
                u, axes = g32 * scale * jax.lax.rsqrt(new.columns), row_axes + column_axes
            rms = jnp.sqrt(jnp.square(u).mean(axes, keepdims=True))
            kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, nu)
            return (u / jnp.maximum(1.0, rms / self.clip)).astype(g.dtype), kept

        pairs = map_with_names(one, updates, state.nu)
        new, nu = unzip(updates, pairs, 2)
        return new, FactoredState(jnp.where(finite, count, state.count), nu)


def _groups(layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of a layer's rows, and of its columns."""
    axes = layout.axes
    return tuple(range(axes.stack, axes.rows_end)), tuple(range(axes.rows_end, len(layout.shape)))


def _means(layout: Layout, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows, columns = _groups(layout)
    return x.mean(columns, keepdims=True), x.mean(rows, keepdims=True)


def _one_tensor(name: str, rank: int) -> tuple[int, ...]:
    """The axes of one layer's vector: its name ends in their letters, a stack has one more."""
    letters = len(name.rsplit("_", 1)[-1])
    return tuple(range(max(rank - letters, 0), rank))
