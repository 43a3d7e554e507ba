"""Which source every sequence of a run comes from: mixtures by weight or by token budget, one after another.

The answer for sequence i is computed from i alone, in O(log sources) and without any table, and so is its inverse. The
sources are the leaves of a balanced binary tree; at a node whose left half has a of every a + b sequences, the first n
sequences hold floor((n a + (a + b) // 2) / (a + b)) of them. So every source's share is within one or two sequences of
what was asked at any point, however many sources there are, and exact where a budget ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

from meshgpt.data.batch_sizes import BatchSizes
from meshgpt.errors import UserError
from meshgpt.settings import settings

_FEW = 8  # sequences for which plain integers are quicker than arrays
_WEIGHT_UNITS = 1 << 24  # weights become integers of this sum
LONGEST = 1 << 50  # sequences of a run, or of a stage: what `_rounded_share` is exact for


@settings("data.mixture.sources")
class Source:
    """A part of a mixture."""

    store: str
    """Folder of a token store made by `meshgpt prepare`."""
    name: str = ""
    """What messages and the ledger call the source; when it is empty, the folder's name."""
    weight: float = 1.0
    """The source's share of the stage's sequences, relative to the other sources' weights."""
    tokens: int = 0
    """Number of tokens of the source that the stage sees, in place of a weight; 0 goes by weight. Either all sources of
    a stage have such a budget or none."""
    max_epochs: float = 1.0
    """How often the whole run may go through the source; 0 sets no limit."""

    def __post_init__(self) -> None:
        if not self.store:
            raise UserError("a source of the mixture names no store: give the folder that `meshgpt prepare` made")
        if not 0.0 < self.weight < float("inf"):
            raise UserError(f"source {self.label!r}: weight {self.weight} must be a positive number; or leave it out")
        if self.tokens < 0:
            raise UserError(f"source {self.label!r}: tokens {self.tokens} must be positive, or 0 to go by weight")
        if self.tokens and self.weight != 1.0:
            raise UserError(f"source {self.label!r} has both a weight ({self.weight}) and tokens ({self.tokens})")
        if not 0.0 <= self.max_epochs < float("inf"):
            raise UserError(f"source {self.label!r}: max_epochs {self.max_epochs} must be positive, or 0 for no limit")

    @property
    def label(self) -> str:
        """The name, given or implied."""
        return self.name or Path(self.store).name or self.store


@settings("data.mixture")
class Stage:
    """A mixture for a part of the run."""

    sources: tuple[Source, ...]
    """The sources that the stage draws from."""
    until_step: int = 0
    """Last step that sees the stage; 0 is the end of the run. A stage with token budgets ends when they are spent, in
    the middle of a step if it so happens, and takes no `until_step`."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("a stage of the mixture has no source")
        for what in ("label", "store"):
            values = [getattr(source, what) for source in self.sources]
            twice = sorted(value for value in set(values) if values.count(value) > 1)
            if twice:
                raise UserError(f"a stage of the mixture names {twice[0]!r} twice: remove one, or rename it")
        if len({source.tokens > 0 for source in self.sources}) > 1:
            named = ", ".join(source.label for source in self.sources if not source.tokens)
            raise UserError(f"a stage goes by weight or by tokens, not both: {named} has no tokens")
        if self.until_step < 0:
            raise UserError(f"until_step {self.until_step} must be positive, or 0 for the end of the run")
        if self.until_step and self.by_tokens:
            raise UserError(f"until_step {self.until_step}: a stage with token budgets ends when they are spent")

    @property
    def by_tokens(self) -> bool:
        return self.sources[0].tokens > 0


def check_stages(stages: Sequence[Stage]) -> None:
    """Raises UserError where stages do not follow one another, or a name stands for two stores."""
    last = 0
    stores: dict[str, str] = {}
    for number, stage in enumerate(stages, start=1):
        if number < len(stages) and not stage.by_tokens and not stage.until_step:
            raise UserError(f"stage {number} of {len(stages)} has no end: give it an until_step, or token budgets")
        if stage.until_step and stage.until_step <= last:
            raise UserError(f"stage {number} ends at until_step {stage.until_step}, not after the one before ({last})")
        last = stage.until_step or last
        for source in stage.sources:
            if stores.setdefault(source.label, source.store) != source.store:
                both = f"{stores[source.label]} and {source.store}"
                raise UserError(f"the source name {source.label!r} stands for {both}: give one of them another name")


@final
class Interleave:
    """The order in which sources of given shares take turns, as a pure function, both ways.

    Args:
        shares: one positive integer a source. Of the first sum(shares) sequences, source k has exactly shares[k].

    Raises:
        UserError: the shares add up to more than 2^50.
    """

    def __init__(self, shares: Sequence[int]):
        self._before = [0]
        for share in shares:
            self._before.append(self._before[-1] + share)
        if self._before[-1] > LONGEST:
            raise UserError(f"a stage of {self._before[-1]:,} sequences: at most {LONGEST:,} can be counted")
        self._count = len(shares)

    def locate(self, index_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, how many sequences of that source came before) of each sequence number, all (n,) int64."""
        source_n, nth_n = np.zeros_like(index_n), np.zeros_like(index_n)
        self._descend(0, self._count, index_n, np.arange(len(index_n)), source_n, nth_n)
        return source_n, nth_n

    def find(self, source: int, nth: int) -> int:
        """The sequence number of a source's `nth` sequence: the inverse of `locate`."""
        low, high = 0, self._count
        path = []
        while high - low > 1:
            middle = (low + high) // 2
            path.append((low, middle, high, source < middle))
            low, high = (low, middle) if source < middle else (middle, high)
        for low, middle, high, left in reversed(path):
            whole, part = self._weigh(low, high), self._weigh(low, middle)
            nth = self._find_left(nth, whole, part) if left else self._find_right(nth, whole, part)
        return nth

    def count(self, source: int, total: int) -> int:
        """How many of the first `total` sequences come from a source."""
        low, high = 0, self._count
        while high - low > 1:
            middle = (low + high) // 2
            whole, part = self._weigh(low, high), self._weigh(low, middle)
            left = (total * part + whole // 2) // whole
            low, high, total = (low, middle, left) if source < middle else (middle, high, total - left)
        return total

    def _weigh(self, low: int, high: int) -> int:
        return self._before[high] - self._before[low]

    def _locate_one(self, low: int, high: int, index: int) -> tuple[int, int]:
        while high - low > 1:
            middle = (low + high) // 2
            whole, part = self._weigh(low, high), self._weigh(low, middle)
            before = (index * part + whole // 2) // whole
            left = ((index + 1) * part + whole // 2) // whole > before
            low, high, index = (low, middle, before) if left else (middle, high, index - before)
        return low, index

    @staticmethod
    def _find_left(nth: int, whole: int, part: int) -> int:
        """The smallest i with floor(((i + 1) part + whole // 2) / whole) == nth + 1."""
        return -(-((nth + 1) * whole - whole // 2) // part) - 1

    @staticmethod
    def _find_right(nth: int, whole: int, part: int) -> int:
        """The smallest i with i + 1 - floor(((i + 1) part + whole // 2) / whole) == nth + 1."""
        index = nth * whole // (whole - part)  # within one of the answer
        index = max(0, index - 2)
        while index + 1 - ((index + 1) * part + whole // 2) // whole <= nth:
            index += 1
        return index

    def _descend(self, low: int, high: int, index, place, source_n, nth_n) -> None:
        if high - low == 1:
            source_n[place], nth_n[place] = low, index
            return
        if len(place) <= _FEW:
            for one, at in zip(index.tolist(), place.tolist(), strict=True):
                source_n[at], nth_n[at] = self._locate_one(low, high, one)
            return
        middle = (low + high) // 2
        whole, part = self._weigh(low, high), self._weigh(low, middle)
        before = _rounded_share(index, part, whole)
        left = _rounded_share(index + 1, part, whole) > before
        self._descend(low, middle, before[left], place[left], source_n, nth_n)
        self._descend(middle, high, (index - before)[~left], place[~left], source_n, nth_n)


def _rounded_share(index_n: np.ndarray, part: int, whole: int) -> np.ndarray:
    """floor((index part + whole // 2) / whole), int64, exact although the product may not fit into 64 bits.

    The quotient is estimated in float64, off by at most 2 for index and whole of up to `LONGEST`. What the estimate
    leaves of the numerator is then a few times `whole` at most: 64-bit integers, which wrap around, have it exactly.
    """
    estimate_n = (index_n * (part / whole)).astype(np.int64)
    rest_n = index_n * np.int64(part) + np.int64(whole // 2) - estimate_n * np.int64(whole)
    return estimate_n + rest_n // whole


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Weights as integers, to within 1e-7 of their sum."""
    total = sum(weights)
    return [max(1, round(weight / total * _WEIGHT_UNITS)) for weight in weights]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stage with everything resolved.

    Attributes:
        sources: numbers of the run's sources.
        turns: how they take turns.
        start, stop: the run's sequences [start, stop) are this phase's; no stop is None.
        done: how many sequences of each of the *run's* sources came before.
    """

    sources: tuple[int, ...]
    turns: Interleave
    start: int
    stop: int | None
    done: tuple[int, ...]


@final
class Schedule:
    """Source and number within that source for every sequence of a run.

    Args:
        stages: one after another, checked (`check_stages`).
        names: the run's sources.
        tokens: of each source, in all.
        lengths: how many sequences each source is cut into.
        sizes: sequences of a step.
    """

    def __init__(
        self, stages: Sequence[Stage], names: Sequence[str], tokens: Sequence[int], lengths: Sequence[int],
        sizes: BatchSizes,
    ):  # fmt: skip
        self._names, self._lengths = tuple(names), tuple(lengths)
        limits = {source.label: source.max_epochs for stage in stages for source in stage.sources}
        self._limits = [limits[name] for name in names]
        self._phases: list[Phase] = []
        start, done = 0, [0] * len(names)
        for stage in stages:
            numbers = [self._names.index(source.label) for source in stage.sources]
            stop = sizes.before(stage.until_step) or None
            if stage.by_tokens:
                shares = [_budget(s, tokens[n], lengths[n]) for s, n in zip(stage.sources, numbers, strict=True)]
                stop = start + sum(shares)
            else:
                shares = integer_weights([source.weight for source in stage.sources])
            if stop is not None and stop <= start:
                raise UserError(f"until_step {stage.until_step} comes before the end of the stage before")
            phase = Phase(sources=tuple(numbers), turns=Interleave(shares), start=start, stop=stop, done=tuple(done))
            self._phases.append(phase)
            if stop is not None:
                for position, number in enumerate(numbers):
                    done[number] += phase.turns.count(position, stop - start)
                start = stop

    def locate(self, sequence_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, number within that source) of sequences of the run, all (n,) int64.

        Raises:
            UserError: a sequence beyond the last stage.
        """
        source_n, nth_n = np.empty_like(sequence_n), np.empty_like(sequence_n)
        for phase in self._phases:
            stop = np.iinfo(np.int64).max if phase.stop is None else phase.stop
            inside = np.flatnonzero((sequence_n >= phase.start) & (sequence_n < stop))
            if not inside.size:
                continue
            position, nth = phase.turns.locate(sequence_n[inside] - phase.start)
            source_n[inside] = np.array(phase.sources)[position]
            nth_n[inside] = nth + np.array(phase.done)[source_n[inside]]
        end = self._phases[-1].stop
        if end is not None and len(sequence_n) and sequence_n.max() >= end:
            raise UserError(self._too_short(int(sequence_n.max()) + 1, end))
        return source_n, nth_n

    def find(self, source: int, nth: int) -> int | None:
        """Which sequence of the run is a source's `nth`; None where the stages end before."""
        for phase in reversed(self._phases):
            if source in phase.sources and nth >= phase.done[source]:
                position = phase.sources.index(source)
                found = phase.start + phase.turns.find(position, nth - phase.done[source])
                return found if phase.stop is None or found < phase.stop else None
        return None

    def used(self, total: int) -> list[int]:
        """How many sequences of each source the first `total` of the run are made of."""
        counts = [0] * len(self._names)
        for phase in self._phases:
            seen = (total if phase.stop is None else min(total, phase.stop)) - phase.start
            if seen > 0:
                for position, number in enumerate(phase.sources):
                    counts[number] += phase.turns.count(position, seen)
        return counts

    def check(self, total: int) -> None:
        """Whether a run of `total` sequences is possible.

        Raises:
            UserError: the stages end before, or a source would be gone through more often than its `max_epochs`.
        """
        end = self._phases[-1].stop
        if end is not None and end < total:
            raise UserError(self._too_short(total, end))
        for name, used, length, limit in zip(self._names, self.used(total), self._lengths, self._limits, strict=True):
            if limit and used > limit * length:
                raise UserError(
                    f"the run goes {used / length:.3f} times through the source {name!r}, whose max_epochs is "
                    f"{limit:g}: raise that, or lower its weight or --steps"
                )

    def _too_short(self, total: int, end: int) -> str:
        return (
            f"the run has {total:,} sequences and the mixture's token budgets end after {end:,}: lower --steps, raise "
            "the budgets, or add a stage by weight"
        )


def _budget(source: Source, tokens: int, length: int) -> int:
    """A budget in sequences."""
    if source.max_epochs and source.tokens > source.max_epochs * tokens:
        raise UserError(
            f"the budget of source {source.label!r}, {source.tokens:,} tokens, is larger than what {source.store} "
            f"gives: {tokens:,} at max_epochs {source.max_epochs:g}. Lower it, prepare more text, or raise max_epochs"
        )
    sequences = (source.tokens * length + tokens // 2) // tokens
    sequences = min(sequences, int(source.max_epochs * length)) if source.max_epochs else sequences
    if sequences < 1:
        raise UserError(f"the budget of source {source.label!r}, {source.tokens:,} tokens, is less than one sequence")
    return sequences
