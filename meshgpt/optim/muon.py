"""Muon's direction: momentum made orthogonal, one layer's matrix at a time.

Legend: G stacked matrices (layers), R rows and C columns of one.
"""

import dataclasses
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from meshgpt.optim.moments import Layout
from meshgpt.trees import Tree, map_with_names

# The quintic whose iteration takes singular values from (0, 1] to about 1 (Jordan et al. 2024; torch.optim.Muon).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5


class MuonState(NamedTuple):
    """mu: a tree like the parameters, the momentum."""

    mu: Tree


@dataclasses.dataclass(frozen=True)
class OrthogonalMomentum:
    """m = beta m + (1 - beta) g;  u = 0.2 sqrt(max(R, C)) orthogonal(beta m + (1 - beta) g), for matrices only.

    Nesterov's momentum as in Jordan et al. 2024; the factor gives u the size of Adam's update (Liu et al. 2025,
    equation 4), so that both take one learning rate.
    """

    beta: float

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        """`update` takes `finite`, a scalar: where it is False the state stays as it was."""
        return optax.GradientTransformationExtraArgs(self.init, cast(Any, self.update))

    def init(self, params: Tree) -> MuonState:
        return MuonState(jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params))

    def update(
        self, updates: Tree, state: MuonState, params: Tree | None = None, *, finite: jax.Array
    ) -> tuple[Tree, MuonState]:
        del params

        def blend(m: jax.Array, g: jax.Array) -> jax.Array:
            return self.beta * m + (1 - self.beta) * g.astype(jnp.float32)

        mu = jax.tree.map(blend, state.mu, updates)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), mu, state.mu)
        ahead = jax.tree.map(lambda m, g: blend(m, g).astype(g.dtype), mu, updates)
        return map_with_names(_orthogonal, ahead), MuonState(kept)


def _orthogonal(name: str, x: jax.Array) -> jax.Array:
    """The parameter's matrices made orthogonal, on the mesh as they are."""
    layout = Layout.of(name, x)
    assert layout is not None, name

    def local(x: jax.Array) -> jax.Array:
        x_GRC = layout.matrices(x)
        return jax.lax.map(lambda x_RC: _orthogonal_part(layout, x_RC), x_GRC).reshape(x.shape)

    if not layout.mesh:
        return local(x)
    spec = PartitionSpec(*layout.spec)
    return jax.shard_map(local, in_specs=spec, out_specs=spec, check_vma=False)(x)


def _orthogonal_part(layout: Layout, x_RC: jax.Array) -> jax.Array:
    """One matrix: its parts are gathered for the products, which every device repeats, and each keeps its own."""
    whole, starts = x_RC, []
    for axis, cuts in enumerate((layout.row_cuts, layout.column_cuts)):
        if cuts:
            whole = jax.lax.all_gather(whole, cuts, axis=axis, tiled=True)
        starts.append(jax.lax.axis_index(cuts) * x_RC.shape[axis] if cuts else 0)
    scale = 0.2 * math.sqrt(max(whole.shape))
    return jax.lax.dynamic_slice(orthogonal(whole), starts, x_RC.shape) * scale


def orthogonal(x_RC: jax.Array) -> jax.Array:
    """Near to U V^T for x = U S V^T, by a Newton-Schulz iteration: singular values end between about 0.7 and 1.2."""
    a, b, c = _COEFFICIENTS
    tall = x_RC.shape[0] > x_RC.shape[1]
    x = x_RC.T if tall else x_RC
    x = x / (jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum()) + 1e-7).astype(x.dtype)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.T if tall else x
