"""How many sequences each step of a run takes, where a resumed run changed that on its way.

Sequence i of a run is a function of (seed, i); this says which of them a step sees. No sequence is left out or seen
twice by a change, whatever the two sizes are.
"""

import bisect
from dataclasses import dataclass
from typing import Any

from meshgpt.errors import UserError


@dataclass(frozen=True)
class BatchSizes:
    """pieces: (from this step on, sequences a step), in order; the first from step 0. Steps count from 0."""

    pieces: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        for _, size in self.pieces:
            if size < 1:
                raise UserError(f"global_batch {size} must be at least 1")

    @staticmethod
    def constant(size: int) -> "BatchSizes":
        return BatchSizes(((0, size),))

    @staticmethod
    def from_json(pieces: Any) -> "BatchSizes":
        return BatchSizes(tuple((int(step), int(size)) for step, size in pieces))

    def to_json(self) -> list[list[int]]:
        return [[step, size] for step, size in self.pieces]

    def changed(self, step: int, size: int) -> "BatchSizes":
        """The same up to `step`, and `size` from there on."""
        kept = tuple(piece for piece in self.pieces if piece[0] < step)
        return BatchSizes(kept if kept and kept[-1][1] == size else (*kept, (step, size)))

    def at(self, step: int) -> int:
        """Sequences of this step."""
        return self.pieces[bisect.bisect_right(self.pieces, step, key=lambda piece: piece[0]) - 1][1]

    def before(self, step: int) -> int:
        """Sequences of all steps before this one: the number of its first."""
        ends = [begin for begin, _ in self.pieces[1:]] + [step]
        return sum(max(0, min(end, step) - begin) * size for (begin, size), end in zip(self.pieces, ends, strict=True))

    def step_of(self, sequence: int) -> int:
        """The step that takes this sequence."""
        begin, size = next(piece for piece in reversed(self.pieces) if self.before(piece[0]) <= sequence)
        return begin + (sequence - self.before(begin)) // size
