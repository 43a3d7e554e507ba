"""Results of evaluations in a run's folder, `evals/<step>.json`, in the lm-evaluation-harness's own form.

Of that form this reads `results` ({task: {"<metric>,<filter>": value, "<metric>_stderr,<filter>": error}}), `n-shot`,
`higher_is_better`, `n-samples` and `intervals`. Evaluations in the loop may also be keys of `metrics.jsonl`:
`eval/<task>/<metric>`, and of a limited one what `evals.results.metrics` adds.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from meshgpt.evals.intervals import (
    LIMITED_OF,
    LIMITED_TO,
    Interval,
    Part,
    error_text,
    is_share,
    limited_part,
)
from meshgpt.evals.results import interval_of, part_of

_KEY = "eval/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One metric of one task at one step. What the file does not say is None.

    part: how many of the task's questions (or documents) were put. interval: with 95%, as it was kept.
    """

    step: int
    task: str
    metric: str
    value: float
    stderr: float | None = None
    shots: int | None = None
    better_up: bool | None = None
    part: Part | None = None
    interval: Interval | None = None

    @property
    def is_share(self) -> bool:
        """Whether the value is a share of 1, to be shown as a percentage."""
        return is_share(self.metric, self.value)

    @property
    def limited(self) -> bool:
        """Whether only a part of the task was measured: a try."""
        return self.part is not None and self.part.limited

    def __str__(self) -> str:
        """The figure as it is read: shares as percentages, with how far it may be off, and whether it is a try."""
        factor, unit = (100, "%") if self.is_share else (1, "")

        def form(number: float) -> str:
            rounded = f"{number * factor:.2f}"
            return rounded if float(rounded) or not number else f"{number * factor:.1g}"

        error = error_text(self.metric, self.value, self.stderr, self.part, self.interval, form)
        return f"{form(self.value)}{unit}{error}"


def read_evals(folder: Path, rows: Iterable[dict[str, Any]], limit: int = 0) -> tuple[list[Result], list[str]]:
    """(results by step, task and metric; names of the files that could not be read).

    Args:
      rows: of metrics.jsonl; where both know a figure, the file in `folder` counts.
      limit: of the run's evaluations, 0 for none: what does not say how much of a task was put is a try then.
    """
    found: dict[tuple[int, str, str], Result] = {}
    for row in rows:
        found |= {(one.step, one.task, one.metric): one for one in _logged(row, limit)}
    unread = []
    for path in sorted(folder.glob("*.json")):
        try:
            results = list(_results(int(path.stem), json.loads(path.read_text(encoding="utf-8")), limit))
        except (ValueError, AttributeError, TypeError, OSError):
            unread.append(path.name)
            continue
        found |= {(result.step, result.task, result.metric): result for result in results}
    return [found[key] for key in sorted(found)], unread


def latest(results: Iterable[Result]) -> list[Result]:
    """Of each task and metric the result of its last step."""
    return list({(result.task, result.metric): result for result in results}.values())


def _logged(row: dict[str, Any], limit: int) -> Iterable[Result]:
    """The results in a line of the metrics."""
    values = {key: value for key, value in row.items() if key.startswith(_KEY) and _finite(value)}
    for key, value in values.items():
        task, _, metric = key.removeprefix(_KEY).rpartition("/")
        end = next((end for end in ("_low", "_high") if key.endswith(end) and key.removesuffix(end) in values), None)
        if not task or metric in (LIMITED_TO, LIMITED_OF) or end:
            continue
        part = limited_part(values, f"{_KEY}{task}") or (Part(used=limit, of=None) if limit else None)
        low, high = values.get(f"{key}_low"), values.get(f"{key}_high")
        between = None if low is None or high is None else (float(low), float(high))
        yield Result(step=row["step"], task=task, metric=metric, value=value, part=part, interval=between)


def _results(step: int, content: dict[str, Any], limit: int) -> Iterable[Result]:
    shots, better = content.get("n-shot", {}), content.get("higher_is_better", {})
    for task, values in content["results"].items():
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            if metric.endswith("_stderr") or metric in ("alias", "name", "sample_len") or not _finite(value):
                continue
            error = values.get(f"{metric}_stderr,{chosen}")
            yield Result(
                step=step,
                task=task,
                metric=metric if chosen in ("", "none") else f"{metric} ({chosen})",
                value=float(value),
                stderr=float(error) if _finite(error) else None,
                shots=shots.get(task) if isinstance(shots.get(task), int) else None,
                better_up=(better.get(task) or {}).get(metric),
                part=part_of(content, task, limit or None),
                interval=interval_of(content, task, key),
            )


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
