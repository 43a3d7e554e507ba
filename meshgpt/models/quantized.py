"""Weights of 4 and 8 bits as values (`layers.Weight`): dequantized inside the program of the matmul that uses them.

A weight is kept as (outputs, inputs), as bitsandbytes has it, its outputs and inputs sharded as those of the parameter
that it stands for. Blocks lie along the inputs; where a device's share of the inputs is not whole blocks, smaller
blocks repeat the scale, so that any mesh that divides the parameter divides the weight.

Legend: L layers, O output axes of the parameter, I its input axes, K blocks of a row, g numbers of a block.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from meshgpt.models.bitsandbytes import FourBit, values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a parameter of one layer lies. shape: (*inputs, *outputs). inputs: how many axes those are. spec: of it."""

    shape: tuple[int, ...]
    inputs: int
    spec: PartitionSpec

    @property
    def outer(self) -> tuple[int, ...]:
        return self.shape[self.inputs :]

    @property
    def inner(self) -> tuple[int, ...]:
        return self.shape[: self.inputs]

    def of_rows(self) -> PartitionSpec:
        """The sharding of (*outputs,)."""
        return PartitionSpec(*self._entries()[self.inputs :])

    def of_blocks(self) -> PartitionSpec:
        """The sharding of (*outputs, K): blocks go with the first axis of the inputs, the only one that is cut."""
        entries = self._entries()
        assert not any(entries[1 : self.inputs]), f"inner axes of the inputs are sharded: {self.spec}"
        return PartitionSpec(*entries[self.inputs :], entries[0])

    def _entries(self) -> tuple:
        return (*self.spec, *(None,) * (len(self.shape) - len(self.spec)))

    def block(self, stored: int, mesh: jax.sharding.Mesh) -> int:
        """Numbers of a block on this mesh, given blocks of `stored` in the file: as many that fit a device's share."""
        entry = self._entries()[0]
        axes = (entry,) if isinstance(entry, str) else entry or ()
        return math.gcd(math.prod(self.inner) // math.prod(mesh.shape[axis] for axis in axes), stored)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight4:
    """A weight of 4 bits: packed_OKg (*outputs, K, g / 2) uint8, two codes a byte, the first in the high bits, and
    absmax_OK (*outputs, K) float32; a leading axis of layers where it is stacked."""

    packed_OKg: jax.Array
    absmax_OK: jax.Array
    kind: FourBit = dataclasses.field(metadata={"static": True})
    place: Place = dataclasses.field(metadata={"static": True})

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        """The parameter of one layer, in its own shape and sharding: values in float32, rounded to `dtype`."""
        blocks = self.place.of_blocks()

        def local(packed: jax.Array, absmax: jax.Array) -> jax.Array:
            codes = jnp.stack([packed >> 4, packed & 15], axis=-1).reshape(*absmax.shape, -1)
            table = jnp.asarray(values(self.kind))
            x_OKg = table.at[codes.astype(jnp.int32)].get(mode="promise_in_bounds") * absmax[..., None]
            return _inputs_first(x_OKg.astype(dtype), self.place)

        whole = jax.shard_map(
            local, in_specs=(PartitionSpec(*blocks, None), blocks), out_specs=self.place.spec, check_vma=False
        )
        return whole(self.packed_OKg, self.absmax_OK)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight8:
    """A weight of LLM.int8(): codes_OI (*outputs, I) int8 and the largest magnitude of each row, largest_O (*outputs,)
    float32; a leading axis of layers where it is stacked."""

    codes_OI: jax.Array
    largest_O: jax.Array
    place: Place = dataclasses.field(metadata={"static": True})

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        """The parameter of one layer, in its own shape and sharding: values in float32, rounded to `dtype`."""

        def local(codes: jax.Array, largest: jax.Array) -> jax.Array:
            x_OI = codes.astype(jnp.float32) * largest[..., None] * np.float32(1 / 127)
            return _inputs_first(x_OI.astype(dtype), self.place)

        specs = (self.place.of_blocks(), self.place.of_rows())
        return jax.shard_map(local, in_specs=specs, out_specs=self.place.spec, check_vma=False)(
            self.codes_OI, self.largest_O
        )


def _inputs_first(x: jax.Array, place: Place) -> jax.Array:
    """One device's (*outputs, ...) as (*inputs, *outputs); the first axis of the inputs is what is left of it here."""
    outer = len(place.outer)
    rows = x.reshape(*x.shape[:outer], -1, *place.inner[1:])
    return jnp.moveaxis(rows, tuple(range(outer)), tuple(range(place.inputs, place.inputs + outer)))
