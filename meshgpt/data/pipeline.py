"""Records to batches, by random access only.

Sequence i of a run is a function of (seed, i): `mixture.Schedule` says which source it comes from and which of that
source's sequences it is, `Permutation` which record that is, another shuffle each epoch. A step takes the sequences
after those of the step before, [s G, (s + 1) G) where the global batch is always G. So the state of the pipeline is the
step number, and neither processes, mesh, accumulation nor prefetching change what a step sees.

Shapes: T sequence length, n rows that one process asks for.
"""

import hashlib
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from meshgpt.data.batch_sizes import BatchSizes
from meshgpt.data.mixture import Schedule
from meshgpt.data.permutation import Permutation
from meshgpt.data.records import Records
from meshgpt.data.store import Split
from meshgpt.errors import UserError

PREFETCH_BATCHES = 4
READ_THREADS = 2

# Rows of a batch: tokens (n, T + 1) int32, and the weights (n, T) float32 of the targets, None where all of them are 1.
Rows = tuple[np.ndarray, np.ndarray | None]


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The batches of a run.

    Attributes:
        sources: what to draw from.
        names: of the sources; each chooses, with the seed, the order within its source.
        schedule: which source every sequence comes from.
        seed: chooses the order.
        sizes: sequences in a step, over all processes and accumulation steps.
    """

    sources: tuple[Records, ...]
    names: tuple[str, ...]
    schedule: Schedule
    seed: int
    sizes: BatchSizes

    @property
    def seq_len(self) -> int:
        return self.sources[0].seq_len

    def locate(self, sequence_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, record of that source) of sequences of the run, all (n,) int64."""
        source_n, nth_n = self.schedule.locate(sequence_n)
        # Row by row: grouped by source, the arrays of a batch of many sources have an element or two each.
        records = [self._record(source, nth) for source, nth in zip(source_n.tolist(), nth_n.tolist(), strict=True)]
        record_n = np.array(records, np.int64)
        return source_n, record_n

    def sequences_with(self, source: int, record: int, stop: int) -> list[int]:
        """Which of the first `stop` sequences of the run are a record of a source."""
        found = []
        epoch = 0
        while True:
            place = self._shuffle(source, epoch).inverse(record)
            sequence = self.schedule.find(source, epoch * len(self.sources[source]) + place)
            if sequence is not None and sequence < stop:
                found.append(sequence)
            begins = self.schedule.find(source, epoch * len(self.sources[source]))
            if begins is None or begins >= stop:
                return found
            epoch += 1

    def rows(self, step: int, row_indices: Sequence[int]) -> Rows:
        """Rows of a step's batch.

        Args:
            step: from 0.
            row_indices: n numbers below the step's size: the rows that this process holds.
        """
        indices = np.asarray(row_indices, np.int64)
        outside = indices[(indices < 0) | (indices >= self.sizes.at(step))]
        if outside.size:
            raise IndexError(f"row {outside[0]} of a batch of {self.sizes.at(step)}")
        source_n, record_n = self.locate(self.sizes.before(step) + indices)
        tokens = np.empty((len(indices), self.seq_len + 1), np.int32)
        counted = np.empty(len(indices), np.int64)
        for i, (source, record) in enumerate(zip(source_n.tolist(), record_n.tolist(), strict=True)):
            counted[i] = self.sources[source].read(record, tokens[i])
        if (counted == self.seq_len).all():
            return tokens, None
        return tokens, (np.arange(self.seq_len)[None] < counted[:, None]).astype(np.float32)

    def digest(self, step: int) -> str:
        """sha256 (hexadecimal) of a step's whole batch: its tokens row by row, little-endian int32, then its weights,
        little-endian float32."""
        tokens, weights = self.rows(step, range(self.sizes.at(step)))
        weights = np.ones((len(tokens), self.seq_len), np.float32) if weights is None else weights
        digest = hashlib.sha256(tokens.astype("<i4").tobytes())
        digest.update(weights.astype("<f4").tobytes())
        return digest.hexdigest()

    def iterate(self, start_step: int, stop_step: int, row_indices: Sequence[int]) -> Generator[Rows, None, None]:
        """`rows` of steps [start_step, stop_step), read ahead by background threads, which `close` ends."""
        import grain

        steps = grain.MapDataset.range(start_step, stop_step)
        batches = steps.map(lambda step: self.rows(step, row_indices))
        options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=PREFETCH_BATCHES)
        with closing(iter(batches.to_iter_dataset(options))) as iterator:
            yield from iterator

    def _record(self, source: int, nth: int) -> int:
        epoch, place = divmod(nth, len(self.sources[source]))
        return self._shuffle(source, epoch)(place)

    def _shuffle(self, source: int, epoch: int) -> Permutation:
        key = f"meshgpt order {self.seed} {self.names[source]} {epoch}"
        return _permutation(len(self.sources[source]), key)


@lru_cache(maxsize=1024)
def _permutation(size: int, key: str) -> Permutation:
    return Permutation(size, key)


@dataclass(frozen=True, kw_only=True)
class EvalBatches:
    """Held-out splits end to end, in order, every one of their tokens a target exactly once.

    The first token is predicted from an end-of-text token put before it. What the last batch has beyond the end has
    weight 0.

    Attributes:
        splits: what to evaluate on, one for each store.
        seq_len: T.
        global_batch: sequences in a batch, over all processes.
    """

    splits: tuple[Split, ...]
    seq_len: int
    global_batch: int

    def __post_init__(self) -> None:
        if self.num_tokens == 0:
            names = ", ".join(str(split.folder) for split in self.splits)
            raise UserError(f"the held-out text of {names} is empty: prepare it with a larger --val-fraction")

    @property
    def num_tokens(self) -> int:
        return sum(split.num_tokens for split in self.splits)

    @property
    def num_bytes(self) -> int:
        """Of the text as UTF-8."""
        return sum(split.num_bytes for split in self.splits)

    @property
    def lossless(self) -> bool:
        """Whether the tokens hold all of the text; otherwise bits per byte would look better than they are."""
        return all(split.lossless for split in self.splits)

    def bytes_of(self, tokens: int) -> float:
        """Bytes of the first so many tokens' text; within a document by its share of tokens."""
        found = 0.0
        for split in self.splits:
            found += split.bytes_of(min(tokens, split.num_tokens))
            tokens = max(0, tokens - split.num_tokens)
        return found

    @property
    def gzip_bits_per_byte(self) -> float | None:
        """What ``gzip -9`` needs, where it was measured for every split."""
        splits = [split for split in self.splits if split.num_bytes]
        bits = [split.gzip_bits_per_byte for split in splits]
        total = sum(each * split.num_bytes for each, split in zip(bits, splits, strict=True) if each is not None)
        return None if None in bits else total / self.num_bytes

    def __len__(self) -> int:
        """How many batches."""
        return -(-self.num_tokens // (self.seq_len * self.global_batch))

    def rows(self, batch: int, row_indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n, T + 1) int32 and weights (n, T) float32 of the targets, for rows in [0, global_batch)."""
        tokens = np.full((len(row_indices), self.seq_len + 1), self.splits[0].eot_id, np.int32)
        weights = np.zeros((len(row_indices), self.seq_len), np.float32)
        for i, row in enumerate(row_indices):
            first = (batch * self.global_batch + int(row)) * self.seq_len  # the first target
            stop = min(first + self.seq_len, self.num_tokens)
            if first >= stop:
                continue
            before = max(0, first - 1)
            tokens[i, 1 - (first - before) : 1 + stop - first] = self._tokens(before, stop)
            weights[i, : stop - first] = 1.0
        return tokens, weights

    def _tokens(self, start: int, stop: int) -> np.ndarray:
        parts = []
        for split in self.splits:
            if start < split.num_tokens and stop > 0:
                parts.append(split.tokens(max(0, start), min(stop, split.num_tokens)))
            start, stop = start - split.num_tokens, stop - split.num_tokens
        return np.concatenate(parts)
