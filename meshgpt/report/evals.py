"""Results of evaluations in a run's folder, `evals/<step>.json`, in the lm-evaluation-harness's own form.

Of that form this reads `results` ({task: {"<metric>,<filter>": value, "<metric>_stderr,<filter>": error}}), `n-shot`
and `higher_is_better`. Evaluations in the loop may also be keys of `metrics.jsonl`: `eval/<task>/<metric>`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_KEY = "eval/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One metric of one task at one step. stderr, shots and better_up are None where the file does not say."""

    step: int
    task: str
    metric: str
    value: float
    stderr: float | None = None
    shots: int | None = None
    better_up: bool | None = None

    @property
    def is_share(self) -> bool:
        """Whether the value is a share of 1, to be shown as a percentage."""
        return self.metric.startswith(("acc", "exact_match", "f1", "mc")) and 0 <= self.value <= 1


def read_evals(folder: Path, rows: Iterable[dict[str, Any]]) -> tuple[list[Result], list[str]]:
    """(results by step, task and metric; names of the files that could not be read).

    `rows` are of metrics.jsonl; where both know a figure, the file in `folder` counts.
    """
    found: dict[tuple[int, str, str], Result] = {}
    for row in rows:
        for key, value in row.items():
            task, _, metric = key.removeprefix(_KEY).rpartition("/")
            if key.startswith(_KEY) and task and _finite(value):
                found[row["step"], task, metric] = Result(step=row["step"], task=task, metric=metric, value=value)
    unread = []
    for path in sorted(folder.glob("*.json")):
        try:
            results = list(_results(int(path.stem), json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, AttributeError, TypeError, OSError):
            unread.append(path.name)
            continue
        found |= {(result.step, result.task, result.metric): result for result in results}
    return [found[key] for key in sorted(found)], unread


def latest(results: Iterable[Result]) -> list[Result]:
    """Of each task and metric the result of its last step."""
    return list({(result.task, result.metric): result for result in results}.values())


def _results(step: int, content: dict[str, Any]) -> Iterable[Result]:
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
            )


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
