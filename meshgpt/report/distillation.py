"""What distillation brought, for a run's card: teacher and student before and after, in one table."""

from __future__ import annotations

import json
import math

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
    names = [name for name in before if "acc" in name.rpartition("/")[2]]
    after = {name: value for name in names if (value := facts.last(name)) is not None}
    rows = [
        _row(f"teacher: {found['teacher']}", found["teacher_val_loss"], names, found["teacher_evals"]),
        _row("student before the first step", found["student_start_val_loss"], names, before),
        _row(f"student after {facts.step:,} steps", now, names, after),
    ]
    note = "Loss and perplexity of the held-out text, in the tokens that both share."
    header = ("", "validation loss", "perplexity", *(name.removeprefix("eval/") for name in names))
    return [
        Heading(level=3, text="Distillation: before and after"),
        Table(header=header, rows=rows, note=note),
    ]


def _row(name: str, loss: float, names: list[str], evals: dict[str, float]) -> tuple[str, ...]:
    accuracies = (f"{evals[figure]:.4f}" if figure in evals else "" for figure in names)
    return name, f"{loss:.4f}", f"{math.exp(min(loss, 700.0)):.2f}", *accuracies
