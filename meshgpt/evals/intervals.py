"""How far a figure may be off: 95% intervals of shares (Wilson) and of ratios of sums (bootstrap), and their wording.

A limited evaluation (`--limit`, `evals.limit`, `eval_batches`) is a try: it is shown with how much of the whole it saw
and with its interval, and is no published result.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

Interval: TypeAlias = tuple[float, float]

LEVEL = 0.95
LIMITED_TO, LIMITED_OF = "limited_to", "limited_of"  # of a limited task in the metrics: how much of it was put
_Z = statistics.NormalDist().inv_cdf(0.5 + LEVEL / 2)
_RESAMPLES = 1000
# A share this near to 0 or 1, with fewer answers of the rarer kind than this, is not told by its standard error: that
# reaches beyond 0 or 1, and is 0 where all answers are alike.
_NEAR, _FEW = 0.1, 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """How much of a text or a task was looked at. of: all there is, None where it is not known. unit: of both."""

    used: int
    of: int | None
    unit: str = ""

    @property
    def limited(self) -> bool:
        return self.of is None or self.used < self.of

    def __str__(self) -> str:
        """`2 of 50`, with the unit where it has one."""
        counted = f"the first {self.used:,}" if self.of is None else f"{self.used:,} of {self.of:,}"
        return f"{counted} {self.unit}".rstrip()


def is_share(metric: str, value: float) -> bool:
    """Whether a metric of this name is a share of 1, such as accuracy."""
    return metric.startswith(("acc", "exact_match", "f1", "mc")) and 0 <= value <= 1


def wilson(share: float, count: int) -> Interval:
    """The score interval of a share of `count` trials (Wilson 1927), which holds for shares near 0 and 1 too.

    Of a mean of values between 0 and 1 that are not all 0 or 1 it is too wide rather than too narrow.
    """
    if count < 1 or not 0 <= share <= 1:
        raise ValueError(f"a share of {share} of {count} trials has no interval")
    scale = 1 + _Z**2 / count
    middle = (share + _Z**2 / (2 * count)) / scale
    half = _Z / scale * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return (0.0 if share == 0 else max(0.0, middle - half), 1.0 if share == 1 else min(1.0, middle + half))


def bootstrap(count: int, statistic: Callable[[np.ndarray], float]) -> Interval | None:
    """The percentile interval of a statistic over `count` items (Efron 1979), by 1,000 resamples of a fixed seed.

    Args:
      statistic: the figure of these items; is given indices, with repetitions.

    Returns:
      (low, high); None for fewer than two items, which say nothing of how items differ.
    """
    if count < 2:
        return None
    rng = np.random.default_rng(0)
    found = [statistic(rng.integers(0, count, count)) for _ in range(_RESAMPLES)]
    low, high = np.quantile(found, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return float(low), float(high)


def ratio_interval(above: np.ndarray, below: np.ndarray) -> Interval | None:
    """`bootstrap` of sum(above) / sum(below) over items, such as the nats and tokens of documents."""
    return bootstrap(len(above), lambda indices: float(above[indices].sum() / below[indices].sum()))


def needs_interval(share: float, count: int) -> bool:
    """Whether a standard error says too little of a share: nearly all of `count` answers are right, or wrong."""
    rarer = min(share, 1 - share)
    return rarer < _NEAR and rarer * count < _FEW


def limited_part(logged: Mapping[str, float], task: str) -> Part | None:
    """How much of a task (`eval/<task>`) a line of the metrics says was put; None where it does not."""
    used, of = logged.get(f"{task}/{LIMITED_TO}"), logged.get(f"{task}/{LIMITED_OF}")
    return None if used is None else Part(used=int(used), of=None if of is None else int(of))


def held_out_part(row: Mapping[str, Any], prefix: str = "val_") -> Part | None:
    """Tokens that a line of the metrics says a held-out loss was measured on, where the run has `eval_batches`.

    Args:
      prefix: `val_` of the run's own text, `val/<store>/` of a named one.
    """
    used, of = row.get(f"{prefix}tokens"), row.get(f"{prefix}tokens_of")
    if not isinstance(used, int | float) or not isinstance(of, int | float):
        return None
    return Part(used=int(used), of=int(of), unit="tokens")


def held_out_interval(row: Mapping[str, Any], prefix: str = "val_") -> Interval | None:
    """The interval that a line of the metrics has of a held-out loss of a part of the text."""
    low, high = row.get(f"{prefix}loss_low"), row.get(f"{prefix}loss_high")
    return (low, high) if isinstance(low, int | float) and isinstance(high, int | float) else None


def held_out_text(row: Mapping[str, Any], prefix: str = "val_") -> str:
    """What is said behind a held-out loss of a part of the text; "" where it was all of it."""
    part, between = held_out_part(row, prefix), held_out_interval(row, prefix)
    if part is None or not part.limited:
        return ""
    return f" (a try: {part}; {_said(between, '.4f')})"


def _said(between: Interval | None, form: str) -> str:
    return "no interval from so few" if between is None else f"95%: {between[0]:{form}} to {between[1]:{form}}"


def error_text(
    metric: str,
    value: float,
    stderr: float | None,
    part: Part | None,
    interval: Interval | None,
    form: Callable[[float], str],
) -> str:
    """What is said behind a figure: ` ± 0.0040`; the interval of a share near 0 or 1; and that a try is one.

    Args:
      part: None where it is not known how much was measured.
      interval: as it was kept; of a share it follows from `part`.
      form: writes a value, or a standard error, as the figure is written.
    """
    share = is_share(metric, value)
    if share and part is not None and part.used and interval is None:
        interval = wilson(value, part.used)
    limited = part is not None and part.limited
    between = "" if interval is None else f"95%: {form(interval[0])} to {form(interval[1])}"
    if limited:
        said = between or "no interval from so few"
        return f" (a try: {part}; {said})"
    if share and part is not None and part.used and needs_interval(value, part.used):
        return f" ({between})"
    if stderr is None or (share and value in (0, 1)):  # their standard error is 0, whatever the number of answers
        return ""
    return f" ± {form(stderr)}"
