"""Matrices laid out for generation on one CPU device: a row for each output, in parts that are multiplied side by side.

A token at a time is a product of a matrix and a vector, as fast as memory gives the matrix. XLA's CPU backend comes
nearest to that speed where it reads the matrix along its rows. It does so on one core: hence the parts, which wait for
nothing of each other. Measured: docs/performance.md.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from meshgpt.distributed.mesh import spec

_PARTS = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsOfOutputs:
    """One layer's matrix as a `layers.Product`.

    parts_OI: one below the other (O, I), the outputs and the inputs each as one axis. outer: the outputs' own axes.
    """

    parts_OI: tuple[jax.Array, ...]
    outer: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, w: jax.Array, inputs: int) -> "RowsOfOutputs":
        """The matrix (*inputs, *outputs), of which `inputs` axes are the first, on a mesh of one device."""
        outer = w.shape[inputs:]
        w_OI = w.reshape(-1, math.prod(outer), out_sharding=spec("_ _")).T
        bounds = np.linspace(0, len(w_OI), _PARTS + 1).astype(int)
        return cls(parts_OI=tuple(w_OI[a:b] for a, b in itertools.pairwise(bounds)), outer=outer)

    def product(self, equation: str, x: jax.Array, axes: str, out: str) -> jax.Array:
        """x (B, T, *inputs) times the matrix, (B, T, *outputs); see `layers.product`."""
        del equation, axes
        x_BTI = x.reshape(*x.shape[:2], -1, out_sharding=spec("_ _ _"))
        y_OBT = jnp.concatenate(
            [jnp.einsum("OI,BTI->OBT", part_OI.astype(x.dtype), x_BTI) for part_OI in self.parts_OI]
        )
        return jnp.moveaxis(y_OBT, 0, -1).reshape(*x.shape[:2], *self.outer, out_sharding=spec(out))
