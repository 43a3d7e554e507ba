"""What distillation brought, for a run's card: teacher and student before and after, in one table."""

from __future__ import annotations

import json
import math

from meshgpt.evals.intervals import limited_part
from meshgpt.report.blocks import Block, Heading, Table
from meshgpt.report.facts import Facts
from meshgpt.training.run_folder import RunFolder


def distillation(facts: Facts) -> list[Block]:
    """The table, or nothing for a run without a teacher."""
    path = RunFolder(facts.folder).distillation
    now = facts.last("val_loss")
    if not path.is_file() or now is None:
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    before = found["student_start_evals"]
    names = [name for name in before if _is_accuracy(name)]
    after = {name: value for name in names if (value := facts.last(name)) is not None}
    rows = [
        _row(f"teacher: {found['teacher']}", found["teacher_val_loss"], names, found["teacher_evals"]),
        _row("student before the first step", found["student_start_val_loss"], names, before),
        _row(f"student after {facts.step:,} steps", now, names, after),
    ]
    part = facts.measured_part()
    text = "the held-out text" if part is None else f"a part of the held-out text (a try: {part})"
    note = f"Loss and perplexity of {text}, in the tokens that both share."
    header = ("", "validation loss", "perplexity", *(_column(name, before) for name in names))
    return [
        Heading(level=3, text="Distillation: before and after"),
        Table(header=header, rows=rows, note=note),
    ]


def _is_accuracy(name: str) -> bool:
    metric = name.rpartition("/")[2]
    return "acc" in metric and not metric.endswith(("_low", "_high"))


def _column(name: str, figures: dict[str, float]) -> str:
    part = limited_part(figures, name.rpartition("/")[0])
    return name.removeprefix("eval/") + ("" if part is None else f" (a try: {part})")


def _row(name: str, loss: float, names: list[str], evals: dict[str, float]) -> tuple[str, ...]:
    accuracies = (f"{evals[figure]:.4f}" if figure in evals else "" for figure in names)
    return name, f"{loss:.4f}", f"{math.exp(min(loss, 700.0)):.2f}", *accuracies
