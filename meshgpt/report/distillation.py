"""What distillation brought, for a run's card: teacher and student before and after, in one table."""

from __future__ import annotations

import json
import math

from meshgpt.report.blocks import Block, Heading, Table
from meshgpt.report.facts import Facts

FILE = "distillation.json"
"""In a run's folder: `teacher`, `teacher_val_loss`, `student_start_val_loss` (nats a token, of the held-out text)."""


def distillation(facts: Facts) -> list[Block]:
    """The table, or nothing for a run without a teacher."""
    path = facts.folder / FILE
    now = facts.last("val_loss")
    if not path.is_file() or now is None:
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    start = found["student_start_val_loss"]
    rows = [
        _row(f"teacher: {found['teacher']}", found["teacher_val_loss"], None),
        _row("student before the first step", start, None),
        _row(f"student after {facts.step:,} steps", now, now - start),
    ]
    note = "Of the held-out text, in the tokens that both share."
    return [
        Heading(level=3, text="Distillation: before and after"),
        Table(header=("", "validation loss", "perplexity", "change in loss"), rows=rows, note=note),
    ]


def _row(name: str, loss: float, change: float | None) -> tuple[str, str, str, str]:
    perplexity = math.exp(min(loss, 700.0))
    return name, f"{loss:.4f}", f"{perplexity:.2f}", "" if change is None else f"{change:+.4f}"
