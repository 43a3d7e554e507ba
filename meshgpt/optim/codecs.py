"""Codecs that keep numbers in 8 or 4 bits: array in, array out, nothing known of meshes or optimizers.

A codec turns numbers of magnitude at most 1 into codes and back. What scales them there is a normalisation: one scale a
block of a row (`block_absmax`, `per_block`), or the smaller of a row's and a column's (`rank1`).

Legend: R rows, C columns, K blocks of a row (the last one may be short).
"""

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

_TINY = np.finfo(np.float32).tiny


class Codec(Protocol):
    """Numbers of magnitude at most 1 as unsigned integers of `bits`, one uint8 each (see `pack`)."""

    @property
    def bits(self) -> int: ...

    def encode(self, x: jax.Array) -> jax.Array:
        """float32 (none negative where no code is) to the uint8 code of the nearest value."""
        ...

    def decode(self, codes: jax.Array) -> jax.Array:
        """The float32 value of each code."""
        ...


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """Dynamic exponent: decades from 1 down, each finer than the one below (Dettmers et al. 2022, section 1.3).

    Decade i of d = bits - 1 holds n_i = 2^i values (2^(i + 1) unsigned), the means of neighbours among n_i + 1 equally
    spaced points from 0.1 to 1, times 10^(i - d + 1); with their negatives when signed, and 1. Codes are ranks.

    The value that is left is 0 when signed. An unsigned code is for second moments, which divide: there it is the lower
    end of the lowest decade, 10^-d, and not 0 as in the paper, so that no number, however small, is decoded to 0.
    """

    bits: int
    signed: bool

    @functools.cached_property
    def values(self) -> np.ndarray:
        """All 2^bits values, ascending, float32: bitsandbytes' `create_dynamic_map`, whose unsigned one begins at 0."""
        positive = [np.linspace(low, high, count) for low, high, count in self._decades()]
        parts = [*positive, np.array([self._lowest, 1.0])] + [-part for part in positive] * self.signed
        return np.sort(np.concatenate(parts)).astype(np.float32)

    @property
    def _lowest(self) -> float:
        return 0.0 if self.signed else 10.0 ** (1 - self.bits)

    def _decades(self) -> list[tuple[float, float, int]]:
        """(lowest, highest, number) of the positive values of each decade, ascending."""
        count = self.bits - 1
        decades = []
        for i in range(count):
            number, unit = 2 ** (i if self.signed else i + 1), 10.0 ** (i - count + 1)
            decades.append((unit * (0.1 + 0.45 / number), unit * (1 - 0.45 / number), number))
        return decades

    def encode(self, x: jax.Array) -> jax.Array:
        """The nearest value's code, by arithmetic: a search of the table would cost ten times as much.

        Within a decade the rank is linear in the value. Decades meet halfway between their nearest values, which is
        further than half a step from the lower one's top: hence the minimum.
        """
        size = jnp.abs(x) if self.signed else x
        slope = shift = top = jnp.zeros_like(size)
        below, rank = self._lowest, 1
        for low, high, number in self._decades():
            step = (high - low) / (number - 1) if number > 1 else 1.0
            inside = size > np.float32((below + low) / 2)
            slope = jnp.where(inside, np.float32(1 / step), slope)
            shift = jnp.where(inside, np.float32(rank - low / step), shift)
            top = jnp.where(inside, np.float32(rank + number - 1), top)
            below, rank = high, rank + number
        ranks = jnp.minimum(jnp.round(size * slope + shift), top)
        ranks = jnp.where(size > np.float32((below + 1) / 2), np.float32(rank), ranks)
        if self.signed:  # 0 has half of the codes below it; there is 1 and no -1, hence the maximum
            zero = np.float32(2 ** (self.bits - 1) - 1)
            ranks = jnp.maximum(jnp.where(x < 0, -ranks, ranks) + zero, 0)
        return ranks.astype(jnp.uint8)

    def decode(self, codes: jax.Array) -> jax.Array:
        return jnp.asarray(self.values).at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")


@dataclasses.dataclass(frozen=True)
class LinearNoZero:
    """(code + 1) / 2^bits: equal steps from just above 0 to 1 (Li, Chen and Zhu 2023, section 4.1).

    A second moment divides: were its small values rounded to 0, their updates would be huge.
    """

    bits: int

    def encode(self, x: jax.Array) -> jax.Array:
        codes = 2**self.bits
        return jnp.clip(jnp.round(x * np.float32(codes)) - 1, 0, np.float32(codes - 1)).astype(jnp.uint8)

    def decode(self, codes: jax.Array) -> jax.Array:
        return (codes.astype(jnp.float32) + 1) * np.float32(2.0**-self.bits)


DYNAMIC_8 = Dynamic(8, signed=True)
DYNAMIC_8_UNSIGNED = Dynamic(8, signed=False)
DYNAMIC_4 = Dynamic(4, signed=True)
LINEAR_4 = LinearNoZero(4)


def block_absmax(x_RC: jax.Array, block: int) -> jax.Array:
    """(R, K): the largest magnitude of each block of `block` columns; a short last block counts as padded with 0."""
    padded = jnp.pad(jnp.abs(x_RC), ((0, 0), (0, -x_RC.shape[1] % block)))
    return padded.reshape(x_RC.shape[0], -1, block).max(-1)


def per_block(a_RK: jax.Array, block: int, columns: int) -> jax.Array:
    """(R, C): every block's number at each of its columns."""
    return jnp.repeat(a_RK, block, axis=1)[:, :columns]


def inverse(scales: jax.Array) -> jax.Array:
    """1 / scale, and 0 for the scale of a block that is all zeros (or so near that its inverse would overflow)."""
    usable = scales >= _TINY
    return jnp.where(usable, 1 / jnp.where(usable, scales, 1), 0)


def quantize(x_RC: jax.Array, codec: Codec, block: int) -> tuple[jax.Array, jax.Array]:
    """Codes (R, C) uint8 and scales (R, K) float32 of a matrix, block by block along its rows."""
    scales_RK = block_absmax(x_RC, block)
    return codec.encode(x_RC * per_block(inverse(scales_RK), block, x_RC.shape[1])), scales_RK


def dequantize(codes_RC: jax.Array, scales_RK: jax.Array, codec: Codec, block: int) -> jax.Array:
    """The matrix whose codes and scales these are, float32."""
    return codec.decode(codes_RC) * per_block(scales_RK, block, codes_RC.shape[1])


def rank1(rows_R1: jax.Array, columns_1C: jax.Array) -> jax.Array:
    """(R, C): min(row's largest, column's largest), above every entry of the matrix (Li, Chen and Zhu, algorithm 4)."""
    return jnp.minimum(rows_R1, columns_1C)


def inverse_rank1(rows_R1: jax.Array, columns_1C: jax.Array) -> jax.Array:
    """(R, C): 1 / `rank1`, by R + C divisions."""
    return jnp.maximum(inverse(rows_R1), inverse(columns_1C))


_SHIFTS = np.array([[[0], [4]]], np.uint8)


def pack(codes_RC: jax.Array) -> jax.Array:
    """(R / 2, C): two 4-bit codes a byte, the even row's in the low bits.

    Rows, because neighbours in a row would not vectorise; by a reduction, because XLA on CPU would otherwise merge this
    with what made the codes, and take six times as long.
    """
    return jnp.sum(codes_RC.reshape(-1, 2, codes_RC.shape[1]) << _SHIFTS, axis=1, dtype=jnp.uint8)


def unpack(packed_RC: jax.Array) -> jax.Array:
    """The inverse of `pack`."""
    return ((packed_RC[:, None] >> _SHIFTS) & 15).reshape(-1, packed_RC.shape[1])
