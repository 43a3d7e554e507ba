"""Token stores to batches, by random access only.

Sequence i of a run is a function of (seed, i), and batch s is sequences [s G, (s + 1) G) for a global batch of G. So
the state of the pipeline is the step number, and neither processes, mesh, accumulation nor prefetching change what a
step sees.

Shapes: T sequence length, n rows that one process asks for.
"""

import hashlib
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from meshgpt.data.store import Split
from meshgpt.errors import UserError

if TYPE_CHECKING:
    import grain

PREFETCH_BATCHES = 4
READ_THREADS = 2


class Sequences:
    """A split cut into records of T + 1 tokens with stride T: inputs are the first T, targets the last T.

    Raises:
        UserError: the split is shorter than one record.
    """

    def __init__(self, split: Split, seq_len: int):
        if seq_len < 1:
            raise UserError(f"seq_len {seq_len} must be at least 1")
        if split.num_tokens < seq_len + 1:
            raise UserError(
                f"the {split.name} split has {split.num_tokens} tokens, fewer than one sequence of seq_len {seq_len} "
                "(and its target) needs: lower --seq-len or prepare more text"
            )
        self.split = split
        self.seq_len = seq_len

    def __len__(self) -> int:
        return (self.split.num_tokens - 1) // self.seq_len

    def __getitem__(self, record: int) -> np.ndarray:
        """Record `record`, (T + 1,), in the store's dtype."""
        start = record * self.seq_len
        return self.split.tokens(start, start + self.seq_len + 1)


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The batches of a run: every epoch is another shuffle of all sequences.

    Attributes:
        sequences: what to draw from.
        seed: chooses the order.
        global_batch: sequences in a step, over all processes and accumulation steps.
    """

    sequences: Sequences
    seed: int
    global_batch: int

    def __post_init__(self) -> None:
        if self.global_batch < 1:
            raise UserError(f"global_batch {self.global_batch} must be at least 1")

    @cached_property
    def _order(self) -> "grain.MapDataset[int]":
        import grain

        # grain shuffles epoch e with seed + e; hashed, the epochs of neighbouring seeds have nothing in common.
        digest = hashlib.sha256(f"meshgpt order {self.seed}".encode()).digest()
        records = grain.MapDataset.range(len(self.sequences))
        return records.shuffle(seed=int.from_bytes(digest[:4], "little")).repeat()

    def record(self, sequence: int) -> int:
        """Which record of `sequences` is sequence number `sequence` of the run."""
        record = self._order[sequence]
        assert record is not None  # grain's None marks a filtered element; nothing filters here
        return record

    def rows(self, step: int, row_indices: Sequence[int]) -> np.ndarray:
        """Rows of a step's batch, (n, T + 1) int32.

        Args:
            step: from 0.
            row_indices: n numbers in [0, global_batch): the rows that this process holds.
        """
        rows = np.empty((len(row_indices), self.sequences.seq_len + 1), np.int32)
        for i, row in enumerate(row_indices):
            if not 0 <= row < self.global_batch:
                raise IndexError(f"row {row} of a batch of {self.global_batch}")
            rows[i] = self.sequences[self.record(step * self.global_batch + int(row))]
        return rows

    def iterate(self, start_step: int, stop_step: int, row_indices: Sequence[int]) -> Generator[np.ndarray, None, None]:
        """`rows` of steps [start_step, stop_step), read ahead by background threads, which `close` ends."""
        import grain

        steps = grain.MapDataset.range(start_step, stop_step)
        batches = steps.map(lambda step: self.rows(step, row_indices))
        options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=PREFETCH_BATCHES)
        with closing(iter(batches.to_iter_dataset(options))) as iterator:
            yield from iterator


@dataclass(frozen=True, kw_only=True)
class EvalBatches:
    """A split in order, every one of its tokens a target exactly once.

    The first token is predicted from an end-of-text token put before it. What the last batch has beyond the split's
    end has weight 0.

    Attributes:
        split: what to evaluate on.
        seq_len: T.
        global_batch: sequences in a batch, over all processes.
    """

    split: Split
    seq_len: int
    global_batch: int

    def __post_init__(self) -> None:
        if self.split.num_tokens == 0:
            raise UserError(f"the {self.split.name} split is empty: prepare it with a larger --val-fraction")

    def __len__(self) -> int:
        """How many batches."""
        return -(-self.split.num_tokens // (self.seq_len * self.global_batch))

    def rows(self, batch: int, row_indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n, T + 1) int32 and weights (n, T) float32 of the targets, for rows in [0, global_batch)."""
        tokens = np.full((len(row_indices), self.seq_len + 1), self.split.eot_id, np.int32)
        weights = np.zeros((len(row_indices), self.seq_len), np.float32)
        for i, row in enumerate(row_indices):
            first = (batch * self.global_batch + int(row)) * self.seq_len  # the first target
            stop = min(first + self.seq_len, self.split.num_tokens)
            if first >= stop:
                continue
            if first > 0:
                tokens[i, 0] = self.split.tokens(first - 1, first)[0]
            tokens[i, 1 : 1 + stop - first] = self.split.tokens(first, stop)
            weights[i, : stop - first] = 1.0
        return tokens, weights
