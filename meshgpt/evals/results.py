"""Results in the lm-evaluation-harness's own form, kept in `<run>/evals/<step>.json`.

    {"results": {task: {"alias": task, "<metric>,<filter>": value, "<metric>_stderr,<filter>": error or "N/A"}},
     "configs", "versions", "n-shot", "higher_is_better", "n-samples", "group_subtasks": each by task, ...}

What was measured without the harness (perplexities, multiple-choice files) is a task of the same form.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from meshgpt.atomic import write_atomically
from meshgpt.errors import UserError
from meshgpt.evals.choices import Accuracy
from meshgpt.evals.perplexity import Perplexity

Results = dict[str, Any]

_BY_TASK = ("results", "groups", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "group_subtasks")


def of_perplexity(task: str, found: Perplexity) -> Results:
    """A measured perplexity as a task."""
    return _of_task(task, found.figures(), {}, found.documents, better_up=False)


def of_choices(task: str, found: Accuracy) -> Results:
    """Answered questions as a task."""
    errors = {"acc": found.acc_stderr, "acc_norm": found.acc_norm_stderr}
    return _of_task(task, {"acc": found.acc, "acc_norm": found.acc_norm}, errors, found.questions, better_up=True)


def merged(old: Results, new: Results) -> Results:
    """Both, where they have a task in common the new; what is not by task is the new's."""
    return old | new | {name: old.get(name, {}) | new.get(name, {}) for name in _BY_TASK if name in old or name in new}


def metrics(results: Results) -> dict[str, float]:
    """`eval/<task>/<metric>` of each figure that is a finite number, as the run's metrics have them.

    A metric whose filter is not "none" is `metric (filter)`.
    """
    found = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not _is_finite(value):
                continue
            found[f"eval/{task}/{metric if chosen == 'none' else f'{metric} ({chosen})'}"] = float(value)
    return found


def read(path: Path) -> Results:
    """What an earlier evaluation left in a file, {} where there is none.

    Raises:
      UserError: the file there holds something else.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content["results"], dict):
            return content
    except (ValueError, KeyError, TypeError, OSError):
        pass
    raise UserError(f"{path} holds no results of an evaluation: move it aside, or give another --out")


def save(path: Path, results: Results) -> None:
    """Writes results, beside what an earlier evaluation left in that file.

    Raises:
      UserError: the file there holds something else.
    """
    results = merged(read(path), results)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(_plain(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def table(results: Results) -> str:
    """The figures for a reader."""
    rows = [("task", "metric", "value", "")]
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float | np.number):
                continue
            error = values.get(f"{metric}_stderr,{chosen}")
            said = f"± {error:.4f}" if isinstance(error, int | float | np.number) else ""
            rows.append((task, metric if chosen == "none" else f"{metric} ({chosen})", f"{value:.4f}", said))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]
    return "\n".join(lines)


def _of_task(
    task: str, figures: Mapping[str, float], errors: Mapping[str, float | None], samples: int, *, better_up: bool
) -> Results:
    values: dict[str, Any] = {"alias": task}
    for metric, value in figures.items():
        error = errors.get(metric)
        values |= {f"{metric},none": value, f"{metric}_stderr,none": "N/A" if error is None else error}
    return {
        "results": {task: values},
        "n-shot": {task: 0},
        "higher_is_better": {task: dict.fromkeys(figures, better_up)},
        "n-samples": {task: {"original": samples, "effective": samples}},
    }


def _plain(value: Any) -> Any:
    """JSON's own types; what is no number that JSON has becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)
