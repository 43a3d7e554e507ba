"""The numbers of bitsandbytes' 4-bit and 8-bit files, in NumPy: a matrix in, what its files hold out, and back.

4 bits: the matrix as (out, in), flat, in blocks of 64; of each block its largest magnitude ("absmax") and the nearest
of 16 values ("quant_map") to every number over it, two a byte, the first in the high bits (Dettmers et al. 2023,
section 3). "Double quantization" keeps the absmax, less their mean, in 8 bits, in blocks of 256. 8 bits: of each row
its largest magnitude, and every number as whole 127ths of it (Dettmers et al. 2022, section 2.1).

All of it equal to bitsandbytes' CPU kernels, ties and roundings included: `tests/test_bnb.py` holds them to it.

Legend: O outputs (rows), I inputs (columns) of a matrix, X its numbers in a row, K blocks.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal, TypeAlias

import numpy as np

FourBit: TypeAlias = Literal["nf4", "fp4"]

BLOCK = 64
NESTED_BLOCK = 256

# NF4: quantiles of the normal distribution (Dettmers et al. 2023, appendix E). FP4: a sign, two bits of exponent, one
# of mantissa, in the order of the codes. Both as bitsandbytes' `get_4bit_type` has them.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)

_CHUNK = 2**20  # numbers worked on at a time, a multiple of the block: the host holds little more than the matrix
_SMALLEST = np.float32(1e-38)  # bitsandbytes' own floor of what it divides by


def values(kind: FourBit) -> np.ndarray:
    """(16,) float32: the value of each code, bitsandbytes' `quant_map`."""
    if kind == "nf4":
        return np.array(_NF4, np.float32)
    table = np.array(_FP4, np.float32)
    return table / table.max()


@functools.cache
def nested_values() -> np.ndarray:
    """(256,) float32, ascending: the value of each 8-bit code of an absmax, bitsandbytes' `nested_quant_map`."""
    found = [0.0, 1.0]
    for decade in range(7):
        edges = _edges(2**decade)
        means = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        found += [*means.tolist(), *(-means).tolist()]
    return np.sort(np.array(found, np.float32))


def _edges(parts: int) -> np.ndarray:
    """(parts + 1,) float32 from 0.1 to 1, with the roundings of `torch.linspace`: from either end, and fused."""
    i = np.arange(parts + 1)
    step = float(np.float32(np.float32(1) - np.float32(0.1)) / np.float32(parts))
    return np.where(2 * i < parts, float(np.float32(0.1)) + step * i, 1 - step * (parts - i)).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nested:
    """An absmax in 8 bits: `nested_values()[codes] * absmax of its block of 256 + offset`."""

    codes_K: np.ndarray
    absmax: np.ndarray
    offset: float


def pack4(x_OI: np.ndarray, kind: FourBit) -> tuple[np.ndarray, np.ndarray]:
    """(packed (O I / 2,) uint8, absmax (O I / 64,) float32) of a matrix of finite numbers.

    Its size has to be a multiple of the block, 64.
    """
    x_X = x_OI.reshape(-1)
    assert x_X.size % BLOCK == 0, f"{x_OI.shape} is not whole blocks"
    packed = np.empty(x_X.size // 2, np.uint8)
    absmax_K = np.empty(x_X.size // BLOCK, np.float32)
    order, bounds = _nearest(kind)
    for start in range(0, x_X.size, _CHUNK):
        blocks = x_X[start : start + _CHUNK].astype(np.float32).reshape(-1, BLOCK)
        largest = np.abs(blocks).max(axis=1)
        scaled = np.clip(blocks * (np.float32(1) / np.maximum(largest, _SMALLEST))[:, None], -1, 1).reshape(-1)
        rank = np.zeros(scaled.size, np.uint8)
        for bound in bounds:
            rank += scaled > bound
        codes = order[rank]
        packed[start // 2 : (start + codes.size) // 2] = codes[::2] << 4 | codes[1::2]
        absmax_K[start // BLOCK : start // BLOCK + largest.size] = largest
    return packed, absmax_K


def unpack4(packed: np.ndarray, absmax_K: np.ndarray, kind: FourBit, block: int) -> np.ndarray:
    """(X,) float32: the numbers that `pack4` packed."""
    table = values(kind)
    codes = np.stack([packed >> 4, packed & 15], axis=-1)
    return (table[codes].reshape(-1, block) * absmax_K[:, None]).reshape(-1)


@functools.cache
def _nearest(kind: FourBit) -> tuple[np.ndarray, np.ndarray]:
    """(codes in the order of their values, the 15 bounds between neighbours)."""
    table = values(kind)
    order = np.argsort(table, kind="stable")
    return order.astype(np.uint8), (table[order[:-1]] + table[order[1:]]) / np.float32(2)


def nest(absmax_K: np.ndarray) -> Nested:
    """Double quantization of an absmax."""
    offset = np.float32(absmax_K.mean(dtype=np.float64))
    codes, absmax = nearest_nested(absmax_K - offset)
    return Nested(codes_K=codes, absmax=absmax, offset=float(offset))


def nearest_nested(x_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes, absmax of each block of 256; the last may be short) of numbers of either sign.

    By way of a table of 65,536 points, as bitsandbytes' CPU kernel does: near, not always nearest.
    """
    blocks = np.pad(x_K, (0, -x_K.size % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    absmax = np.abs(blocks).max(axis=1)
    usable = absmax > 0
    inverse = np.where(usable, np.float32(1) / np.where(usable, absmax, np.float32(1)), np.float32(0))
    scaled = np.clip(blocks * inverse[:, None], -1, 1)
    points = (scaled + np.float32(1)) * np.float32(0.5) * np.float32(65535) + np.float32(0.5)
    codes = np.where(usable[:, None], _points()[points.astype(np.uint16)], np.uint8(0))
    return codes.reshape(-1)[: x_K.size], absmax


@functools.cache
def _points() -> np.ndarray:
    """(65536,): the code nearest to each of as many equally spaced points from -1 to 1."""
    table = nested_values()
    bounds = np.float32(0.5) * (table[:-1] + table[1:])
    at = np.float32(-1) + (np.float32(2) * np.arange(65536, dtype=np.float32)) / np.float32(65535)
    return np.searchsorted(bounds, at, side="left").astype(np.uint8)


def unnest(nested: Nested, table: np.ndarray, block: int) -> np.ndarray:
    """(K,) float32: the absmax that was nested with the 256 values of `table`, in blocks of `block`."""
    scale = np.repeat(nested.absmax, block)[: nested.codes_K.size]
    return table[nested.codes_K] * scale + np.float32(nested.offset)


def rows8(x_OI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes (O, I) int8, largest magnitudes (O,) float32), of the matrix rounded to float16: LLM.int8()'s weights."""
    codes_OI = np.empty(x_OI.shape, np.int8)
    largest_O = np.empty(x_OI.shape[0], np.float32)
    for rows in _row_chunks(x_OI.shape):
        x = x_OI[rows].astype(np.float16).astype(np.float32)
        largest = np.abs(x).max(axis=1)
        factor = np.float32(1) / np.where(largest > 0, largest, np.float32(1)) * np.float32(127)
        codes_OI[rows] = np.round(x * factor[:, None])
        largest_O[rows] = largest
    return codes_OI, largest_O


def unrows8(codes_OI: np.ndarray, largest_O: np.ndarray) -> np.ndarray:
    """(O, I) float32: the matrix of `rows8`."""
    return codes_OI.astype(np.float32) * largest_O[:, None] * np.float32(1 / 127)


def _row_chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    rows = max(1, _CHUNK // shape[1])
    return (slice(start, start + rows) for start in range(0, shape[0], rows))
