"""Results in the lm-evaluation-harness's own form, kept in `<run>/evals/<step>.json`.

    {"results": {task: {"alias": task, "<metric>,<filter>": value, "<metric>_stderr,<filter>": error or "N/A"}},
     "configs", "versions", "n-shot", "higher_is_better", "n-samples", "group_subtasks": each by task, ...}

and beside the harness's fields `intervals`, {task: {"<metric>,<filter>": [low, high] or null}}, with 95%. A task whose
`n-samples` were effectively fewer than there are was limited: a try. What was measured without the harness
(perplexities, multiple-choice files) is a task of the same form.
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
from meshgpt.evals.intervals import LIMITED_OF, LIMITED_TO, Interval, Part, error_text, wilson
from meshgpt.evals.perplexity import Perplexity

Results = dict[str, Any]

_BY_TASK = (
    *("results", "groups", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "group_subtasks"),
    "intervals",
)


def of_perplexity(task: str, found: Perplexity, of: int | None = None) -> Results:
    """A measured perplexity as a task.

    Args:
      of: documents of the whole text, where not all of them were measured.
    """
    part = Part(used=found.documents, of=found.documents if of is None else of)
    ranges = found.intervals() if part.limited else {}
    return _of_task(task, found.figures(), {}, ranges, part, better_up=False)


def of_choices(task: str, found: Accuracy, of: int | None = None) -> Results:
    """Answered questions as a task.

    Args:
      of: questions of the whole file, where not all of them were put.
    """
    errors = {"acc": found.acc_stderr, "acc_norm": found.acc_norm_stderr}
    figures = {"acc": found.acc, "acc_norm": found.acc_norm}
    ranges = {name: wilson(share, found.questions) for name, share in figures.items()}
    part = Part(used=found.questions, of=found.questions if of is None else of)
    return _of_task(task, figures, errors, ranges, part, better_up=True)


def part_of(results: Results, task: str, limit: int | None = None) -> Part | None:
    """How much of a task was measured, of a group all of its tasks together; None where the results do not say.

    Args:
      limit: that the run was given. Results of before intervals were kept say of a limited file only how much of it
        was measured, and then all there is counts as not known.
    """
    counted = results.get("n-samples", {}).get(task)
    if isinstance(counted, Mapping):
        used, of = counted.get("effective"), counted.get("original")
        if type(used) is not int or type(of) is not int:
            return None
        old = used == of == limit and task not in results.get("intervals", {})
        return Part(used=used, of=None if old else of)
    inside = [name for name in results.get("group_subtasks", {}).get(task) or [] if name != task]
    known = [part for part in (part_of(results, name, limit) for name in inside) if part is not None]
    if not known:
        return None
    whole = [part.of for part in known if part.of is not None]
    return Part(used=sum(part.used for part in known), of=sum(whole) if len(whole) == len(known) else None)


def interval_of(results: Results, task: str, key: str) -> Interval | None:
    """The interval that was kept of `<metric>,<filter>` of a task."""
    found = results.get("intervals", {}).get(task, {}).get(key)
    if isinstance(found, list | tuple) and len(found) == 2 and all(_is_finite(end) for end in found):
        return float(found[0]), float(found[1])
    return None


def merged(old: Results, new: Results) -> Results:
    """Both, where they have a task in common the new; what is not by task is the new's."""
    return old | new | {name: old.get(name, {}) | new.get(name, {}) for name in _BY_TASK if name in old or name in new}


def metrics(results: Results) -> dict[str, float]:
    """`eval/<task>/<metric>` of each figure that is a finite number, as the run's metrics have them.

    A metric whose filter is not "none" is `metric (filter)`. A limited task also has `eval/<task>/limited_to` and
    `limited_of`, and `<metric>_low` and `<metric>_high` of each metric whose interval is known.
    """
    found: dict[str, float] = {}
    for task, values in results["results"].items():
        part = part_of(results, task)
        limited = part is not None and part.limited
        if part is not None and limited:
            found[f"eval/{task}/{LIMITED_TO}"] = float(part.used)
            found |= {} if part.of is None else {f"eval/{task}/{LIMITED_OF}": float(part.of)}
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not _is_finite(value):
                continue
            name = f"eval/{task}/{metric if chosen == 'none' else f'{metric} ({chosen})'}"
            found[name] = float(value)
            between = interval_of(results, task, key) if limited else None
            if between is not None:
                found |= {f"{name}_low": between[0], f"{name}_high": between[1]}
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
            said = error_text(
                metric, float(value), float(error) if _is_finite(error) else None, part_of(results, task),
                interval_of(results, task, key), lambda number: f"{number:.4f}",
            )  # fmt: skip
            name = metric if chosen == "none" else f"{metric} ({chosen})"
            rows.append((task, name, f"{value:.4f}", said.strip()))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]
    return "\n".join(lines)


def _of_task(
    task: str,
    figures: Mapping[str, float],
    errors: Mapping[str, float | None],
    intervals: Mapping[str, Interval | None],
    part: Part,
    *,
    better_up: bool,
) -> Results:
    values: dict[str, Any] = {"alias": task}
    for metric, value in figures.items():
        error = errors.get(metric)
        values |= {f"{metric},none": value, f"{metric}_stderr,none": "N/A" if error is None else error}
    return {
        "results": {task: values},
        "n-shot": {task: 0},
        "higher_is_better": {task: dict.fromkeys(figures, better_up)},
        "n-samples": {task: {"original": part.of, "effective": part.used}},
        "intervals": {task: {f"{metric},none": intervals.get(metric) for metric in figures}},
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
