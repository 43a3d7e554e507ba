"""A shuffle of 0 .. n - 1 that is computed, not stored: any element of it, and where any element went, in O(1).

Rounds of multiplication by an odd number, addition and shift-xor are bijections of b-bit numbers (b the bits of n - 1);
what falls outside of n is sent through again, which keeps them a bijection of [0, n) (cycle walking: Black and Rogaway
2002). The keys come from a seed by SHA-256, so the order is the same on every machine and in every version of numpy.
"""

import hashlib
from typing import final

import numpy as np

_ROUNDS = 6


@final
class Permutation:
    """A permutation of [0, size) that `key` chooses."""

    def __init__(self, size: int, key: str):
        self.size = size
        self._bits = max(2, (size - 1).bit_length())
        mask = (1 << self._bits) - 1
        self._mask = np.uint64(mask)
        self._shift = np.uint64((self._bits + 1) // 2)  # at least half of the bits, so that it undoes itself
        words = [
            int.from_bytes(hashlib.sha256(f"{key} {number}".encode()).digest()[:8], "little")
            for number in range(2 * _ROUNDS)
        ]
        factors = [word & mask | 1 for word in words[:_ROUNDS]]
        self._factors = [np.uint64(factor) for factor in factors]
        self._inverses = [np.uint64(pow(factor, -1, 1 << self._bits)) for factor in factors]
        self._offsets = [np.uint64(word & mask) for word in words[_ROUNDS:]]

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """What stands at each place of `index`, (n,) int64 in [0, size), likewise."""
        return self._walk(index, self._forward)

    def inverse(self, element: np.ndarray) -> np.ndarray:
        """The place of each element: inverse(self(i)) == i."""
        return self._walk(element, self._backward)

    def _walk(self, values: np.ndarray, step) -> np.ndarray:
        result = step(values.astype(np.uint64))
        while (outside := np.flatnonzero(result >= self.size)).size:
            result[outside] = step(result[outside])
        return result.astype(np.int64)

    def _forward(self, x: np.ndarray) -> np.ndarray:
        for factor, offset in zip(self._factors, self._offsets, strict=True):
            x = (x * factor + offset) & self._mask  # unsigned arithmetic wraps, and the mask divides 2^64
            x ^= x >> self._shift
        return x

    def _backward(self, x: np.ndarray) -> np.ndarray:
        for factor, offset in zip(reversed(self._inverses), reversed(self._offsets), strict=True):
            x = x ^ (x >> self._shift)
            x = ((x - offset) * factor) & self._mask
        return x
