"""What is plotted: the same panels become PNG files and interactive charts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from meshgpt.report.evals import Result
from meshgpt.report.facts import Facts
from meshgpt.report.yardstick import other_text, other_tokens
from meshgpt.training.loss_curve import smooth


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """A curve. x, y: (n,) float64, NaN is a gap. kind: faint for single steps, marked for evaluations.

    color: an index into the palette, equal for the curves that belong together.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    kind: Literal["faint", "line", "marked"] = "line"
    color: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """A plot. slug: names its file. Only panels with something to show are made."""

    slug: str
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]


def panels(runs: Sequence[Facts]) -> list[Panel]:
    """All panels of a run, or of several beside each other; those without a finite value are left out."""
    named = [(run.name, run.yardstick) for run in runs] if len(runs) > 1 else []
    apart = other_text(named) or other_tokens(named)
    per_token = f"nats per token; not comparable: {apart}" if apart else "nats per token"
    made = [
        Panel(
            slug="loss_tokens", title="Loss against tokens", x_label="tokens", y_label=f"loss ({per_token})",
            series=_losses(runs, lambda run: 1.0),
        ),
        Panel(
            slug="loss_flops", title="Loss against compute", x_label="FLOPs", y_label=f"loss ({per_token})",
            series=_losses(runs, lambda run: float(run.flops_per_token)),
        ),
        _by_step(runs, "val_bits_per_byte", "Bits per byte of held-out text", "bits per byte", marked=True),
        _named_validation(runs),
        *_tasks(runs),
        _by_step(runs, "learning_rate", "Learning rate", "learning rate"),
        _by_step(runs, "grad_norm", "Gradient norm", "global norm before clipping"),
        _by_step(runs, "tokens_per_second", "Throughput", "tokens per second"),
    ]  # fmt: skip
    return [panel for panel in made if any(np.isfinite(series.y).any() for series in panel.series)]


def _losses(runs: Sequence[Facts], scale: Callable[[Facts], float]) -> list[Series]:
    """Training (single steps faint, their running mean strong) and validation loss, against tokens times `scale`."""
    curves = []
    for color, run in enumerate(runs):
        steps, loss = run.series("loss")
        val_steps, val_loss = run.series("val_loss")
        of = f" {run.name}" if len(runs) > 1 else ""
        second = color if len(runs) > 1 else 1
        x, val_x = (_tokens(run, at) * scale(run) for at in (steps, val_steps))
        curves += [
            Series(label=f"each step{of}", x=x, y=loss, kind="faint", color=color),
            Series(label=f"training{of}", x=x, y=smooth(loss), color=color),
            Series(label=f"validation{of}{_try(run)}", x=val_x, y=val_loss, kind="marked", color=second),
        ]
    return [curve for curve in curves if curve.y.size]


def _try(run: Facts, prefix: str = "val_") -> str:
    """Said of a curve whose figures are of a part of a held-out text."""
    part = run.measured_part(prefix)
    return "" if part is None else f" (a try: {part})"


def _tokens(run: Facts, steps: np.ndarray) -> np.ndarray:
    return np.array([run.tokens_by(int(step)) for step in steps], np.float64)


def _by_step(runs: Sequence[Facts], key: str, title: str, y_label: str, marked: bool = False) -> Panel:
    curves = []
    for color, run in enumerate(runs):
        steps, values = run.series(key)
        label = (run.name if len(runs) > 1 else title.lower()) + (_try(run) if key.startswith("val_") else "")
        curves.append(Series(label=label, x=steps, y=values, kind="marked" if marked else "line", color=color))
    return Panel(slug=key, title=title, x_label="step", y_label=y_label, series=curves)


def _named_validation(runs: Sequence[Facts]) -> Panel:
    """Loss on each of several named validation stores, by step."""
    curves = []
    for run in runs:
        for key in dict.fromkeys(key for row in run.rows for key in row if _is_validation(key)):
            steps, values = run.series(key)
            label = key.removeprefix("val/").removesuffix("/loss") + (f" {run.name}" if len(runs) > 1 else "")
            label += _try(run, key.removesuffix("loss"))
            curves.append(Series(label=label, x=steps, y=values, kind="marked", color=len(curves)))
    title = "Loss on each validation text"
    return Panel(slug="validation", title=title, x_label="step", y_label="loss (nats per token)", series=curves)


def _is_validation(key: str) -> bool:
    return key.startswith("val/") and key.endswith("/loss")


def _tasks(runs: Sequence[Facts]) -> list[Panel]:
    """Shares of 1 (accuracy and the like) in one panel, perplexities in another."""

    def panel(slug: str, title: str, y_label: str, chosen: Callable[[Result], bool]) -> Panel:
        curves: list[Series] = []
        for run in runs:
            results = [result for result in run.results if chosen(result)]
            for task, metric in dict.fromkeys((result.task, result.metric) for result in results):
                own = [result for result in results if (result.task, result.metric) == (task, metric)]
                x, y = np.array([(result.step, result.value) for result in own], dtype=float).T
                label = f"{task} {metric}" + (f" {run.name}" if len(runs) > 1 else "")
                label += f" (a try: {own[-1].part})" if own[-1].limited else ""
                label += " (tries among them)" if not own[-1].limited and any(one.limited for one in own) else ""
                curves.append(Series(label=label, x=x, y=y, kind="marked", color=len(curves)))
        return Panel(slug=slug, title=title, x_label="step", y_label=y_label, series=curves)

    return [
        panel("tasks", "Tasks by iteration", "share right", lambda result: result.is_share),
        panel("perplexity", "Perplexity by iteration", "perplexity", lambda result: "perplexity" in result.metric),
    ]
