"""Low-rank adapters: a weight W with a product A B of low rank beside it (Hu et al. 2021, "LoRA").

y = x W + scale * drop(x) A B,  scale = alpha / rank

Legend: R rank; the other letters as in `layers`. A has the axes of W that meet x, then R; B has R, then the others.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from meshgpt.distributed.mesh import spec
from meshgpt.models.layers import Weight, dropout, gather_for_compute, product
from meshgpt.trees import MatrixAxes


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["base", "a", "b", "key"], meta_fields=["scale", "rate"]
)
@dataclasses.dataclass(frozen=True)
class LowRank:
    """W + scale * A B, a `Weight` and a `Product`; stacked over layers, or one layer's.

    base: W, an array or any other `Weight`. key: of the dropout at `rate` before A, as `jax.random.key_data`; None for
    none.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    key: jax.Array | None
    scale: float
    rate: float

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        """One layer's W + scale * A B, summed in float32."""
        base = self.base.dense(jnp.float32) if isinstance(self.base, Weight) else self.base.astype(jnp.float32)
        delta = jnp.tensordot(self.a.astype(jnp.float32), self.b.astype(jnp.float32), 1)
        return (base + jnp.float32(self.scale) * delta).astype(dtype)

    def product(self, equation: str, x: jax.Array, axes: str, out: str) -> jax.Array:
        """x W + scale * drop(x) A B without ever forming A B."""
        terms, result = equation.split("->")
        inputs, letters = terms.split(",")
        meets = sum(letter in inputs for letter in letters)
        names, lies = axes.split(), dict(zip(result, out.split(), strict=True))
        kept = "".join(letter for letter in inputs if letter not in letters)
        a = gather_for_compute(self.a, " ".join([*names[:meets], "_"]), x.dtype)
        b = gather_for_compute(self.b, " ".join(["_", *names[meets:]]), x.dtype)
        key = None if self.key is None else jax.random.wrap_key_data(self.key)
        low = jnp.einsum(
            f"{inputs},{letters[:meets]}r->{kept}r", dropout(x, self.rate, key), a,
            out_sharding=spec(" ".join([*(lies[letter] for letter in kept), "_"])),
        )  # fmt: skip
        delta = jnp.einsum(f"{kept}r,r{letters[meets:]}->{result}", low, b, out_sharding=spec(out))
        return product(equation, x, self.base, axes, out) + jnp.asarray(self.scale, x.dtype) * delta


def adapter(name: str, leaf: jax.ShapeDtypeStruct, rank: int, key: jax.Array) -> dict[str, jax.Array]:
    """A fresh adapter of the stacked matrices `name`, in float32, lying on the mesh as they do.

    A is uniform within 1 / sqrt(rows), as PEFT's is, and B zero: the model starts as it was.
    """
    axes, letters = _axes(name, leaf), str(name.rsplit("_", 1)[1])
    lies = (*leaf.sharding.spec, *(None,) * (leaf.ndim - len(leaf.sharding.spec)))
    stack, end = axes.stack, axes.rows_end
    bound = 1 / math.sqrt(axes.shape(leaf.shape)[1])
    a_shape, b_shape = (*leaf.shape[:end], rank), (*leaf.shape[:stack], rank, *leaf.shape[end:])
    a = jax.random.uniform(
        key, a_shape, jnp.float32, -bound, bound, out_sharding=PartitionSpec(*lies[:end], None)
    )  # fmt: skip
    b = jnp.zeros(b_shape, jnp.float32, out_sharding=PartitionSpec(*lies[:stack], None, *lies[end:]))
    return {f"a_{letters[: end - stack]}R": a, f"b_R{letters[end - stack :]}": b}


def smaller_side(name: str, leaf: jax.ShapeDtypeStruct) -> int:
    """Of one layer's matrix: no adapter has a larger rank."""
    return min(_axes(name, leaf).shape(leaf.shape)[1:])


def factors(adapter: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """A and B of what `adapter` makes."""
    a, b = (next(leaf for name, leaf in adapter.items() if name.startswith(first)) for first in "ab")
    return a, b


def merged(stacked: LowRank, dtype: jnp.dtype) -> jax.Array:
    """The sum of base and adapter for all layers, as a plain array."""
    return jax.vmap(lambda one: one.dense(dtype))(stacked)


def _axes(name: str, leaf: Any) -> MatrixAxes:
    axes = MatrixAxes.of(name, leaf.ndim)
    assert axes is not None, f"{name} is no matrix"
    return axes
