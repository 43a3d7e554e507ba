"""The panels of a report as PNG files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from meshgpt.atomic import replacing
from meshgpt.training.loss_curve import INK, fit_axes, plain_label, style_axes

if TYPE_CHECKING:
    from meshgpt.report.panels import Panel

PALETTE = ("#2a6fbb", "#d1495b", "#2f8f6b", "#b7791f", "#7b5ea7", "#0e7490", "#9d4f7a", "#5f6b7a")


def draw_panel(panel: Panel, out_png: Path) -> None:
    """Draws one panel; NaN is a gap, and the axes fit the curves without single steps (`faint`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    style_axes(axes, panel.title)
    axes.set_xlabel(panel.x_label, color=INK)
    axes.set_ylabel(panel.y_label, color=INK)
    for series in panel.series:
        color = PALETTE[series.color % len(PALETTE)]
        style = {
            "faint": {"alpha": 0.25, "linewidth": 0.8},
            "line": {"linewidth": 1.8, "label": plain_label(series.label)},
            "marked": {"linewidth": 1.5, "marker": "o", "markersize": 4, "label": plain_label(series.label)},
        }[series.kind]
        axes.plot(series.x, series.y, color=color, **style)
    shown = [series for series in panel.series if series.kind != "faint" and np.isfinite(series.y).any()]
    if shown:
        fit_axes(axes, np.concatenate([s.x for s in shown]), np.concatenate([s.y for s in shown]))
        axes.legend(frameon=False, labelcolor=INK, fontsize=9 if len(shown) < 8 else 7)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")  # a run's name may be in any script
        with replacing(out_png) as scratch:
            figure.savefig(scratch, format="png", metadata={"Software": None})
