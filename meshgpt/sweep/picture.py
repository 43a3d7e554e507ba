"""A sweep as a picture: the metric against each flag."""

from collections.abc import Mapping
from pathlib import Path

from meshgpt.atomic import replacing
from meshgpt.training.loss_curve import INK, TRAIN, VALIDATION


def draw(path: Path, metric: str, columns: Mapping[str, tuple[list[str], list[float], bool]], maximize: bool) -> None:
    """A panel a flag: (value, score) of each trial, the best one marked; numbers on their scale, words side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(columns), 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
    for axes, (flag, (values, scores, logarithmic)) in zip(panels, columns.items(), strict=True):
        numbers = _numbers(values)
        places = numbers if numbers is not None else [sorted(set(values)).index(value) for value in values]
        axes.scatter(places, scores, color=TRAIN, alpha=0.75, zorder=2)
        best = (max if maximize else min)(range(len(scores)), key=scores.__getitem__)
        axes.scatter([places[best]], [scores[best]], color=VALIDATION, zorder=3, label=f"{scores[best]:.4g}")
        if numbers is None:
            axes.set_xticks(range(len(set(values))), sorted(set(values)))
        elif logarithmic:
            axes.set_xscale("log")
        axes.set_xlabel(flag, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    panels[0].set_ylabel(metric, color=INK)
    panels[0].legend(frameon=False, title="best")
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png", metadata={"Software": None})


def _numbers(values: list[str]) -> list[float] | None:
    try:
        return [float(value) for value in values]
    except ValueError:
        return None
