"""A report as files: README.md (the model card), report.html, and the plots as PNG."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from meshgpt.atomic import write_atomically
from meshgpt.errors import UserError
from meshgpt.report.blocks import Block, Figure, Heading, Text, to_markdown
from meshgpt.report.card import CardOptions, card
from meshgpt.report.facts import Facts, read_facts
from meshgpt.report.front_matter import front_matter
from meshgpt.report.html import page
from meshgpt.report.panels import Panel, panels
from meshgpt.report.plots import draw_panel
from meshgpt.report.tables import compared_by, comparison

PLOTS = "plots"


def document(runs: Sequence[Facts], options: CardOptions) -> tuple[str, list[Block], list[Panel]]:
    """(title, blocks, panels): the card of one run, or a comparison of several."""
    drawn = panels(runs)
    if len(runs) == 1:
        return runs[0].name, card(runs[0], drawn, options), drawn
    title = " and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    blocks: list[Block] = [Heading(level=1, text=title), *comparison(runs, options.energy)]
    _, note = compared_by(runs)
    blocks += [
        Heading(level=2, text="Curves"),
        *([Text(text=note)] if note else []),
        *(Figure(slug=panel.slug, caption=panel.title) for panel in drawn),
    ]
    return title, blocks, drawn


def read_runs(paths: Sequence[Path]) -> list[Facts]:
    """The runs at `paths`; runs whose folders have the same name are told apart by the folder above.

    Raises:
      UserError: a path that holds no run, or the same run twice.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("the same run is named twice: name different ones to compare")
    runs = [read_facts(path) for path in paths]
    times = Counter(run.name for run in runs)
    names = [f"{run.folder.resolve().parent.name}/{run.name}" if times[run.name] > 1 else run.name for run in runs]
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def write_report(runs: Sequence[Facts], out: Path, options: CardOptions) -> list[Path]:
    """Writes the report of one run, or the comparison of several, into `out`; gives the files."""
    title, blocks, drawn = document(runs, options)
    try:
        (out / PLOTS).mkdir(parents=True, exist_ok=True)
        plots = [out / PLOTS / f"{panel.slug}.png" for panel in drawn]
        for panel, path in zip(drawn, plots, strict=True):
            draw_panel(panel, path)
        front = front_matter(runs[0], options) if len(runs) == 1 else ""
        texts = {"README.md": front + to_markdown(blocks, PLOTS), "report.html": page(title, blocks, drawn)}
        for name, text in texts.items():
            write_atomically(out / name, text)
    except OSError as error:
        raise UserError(f"cannot write the report to {out}: {error.strerror}; give another --out") from error
    return [out / "README.md", out / "report.html", *plots]
