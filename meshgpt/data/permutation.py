"""A shuffle of 0 .. n - 1 that is computed, not stored: any element of it, and where any element went, in O(1).

Rounds of multiplication by an odd number, addition and shift-xor are bijections of b-bit numbers (b the bits of n - 1);
what falls outside of n is sent through again, which keeps them a bijection of [0, n) (cycle walking: Black and Rogaway
2002). The keys come from a seed by SHA-256, so the order is the same on every machine and in every version.
"""

import hashlib
from typing import final

_ROUNDS = 6


@final
class Permutation:
    """A permutation of [0, size) that `key` chooses."""

    def __init__(self, size: int, key: str):
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self._mask = mask = (1 << bits) - 1
        self._shift = (bits + 1) // 2  # at least half of the bits, so that it undoes itself
        words = [
            int.from_bytes(hashlib.sha256(f"{key} {number}".encode()).digest()[:8], "little") & mask
            for number in range(2 * _ROUNDS)
        ]
        self._rounds = [(factor | 1, offset) for factor, offset in zip(words[:_ROUNDS], words[_ROUNDS:], strict=True)]
        self._undo = [(pow(factor, -1, mask + 1), offset) for factor, offset in reversed(self._rounds)]

    def __call__(self, place: int) -> int:
        """What stands at a place in [0, size)."""
        mask, shift = self._mask, self._shift
        while True:
            for factor, offset in self._rounds:
                place = (place * factor + offset) & mask
                place ^= place >> shift
            if place < self.size:
                return place

    def inverse(self, element: int) -> int:
        """The place of an element: inverse(self(i)) == i."""
        mask, shift = self._mask, self._shift
        while True:
            for factor, offset in self._undo:
                element ^= element >> shift
                element = ((element - offset) * factor) & mask
            if element < self.size:
                return element
