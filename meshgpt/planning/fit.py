"""`meshgpt plan fit`: L(N, D) fitted to one's own runs, what it predicts of others, and how that turned out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tyro

from meshgpt import flags
from meshgpt.atomic import replacing
from meshgpt.errors import UserError
from meshgpt.optim.config import Constant, InverseSqrt
from meshgpt.planning.scaling_laws import Counting, Fit, Points, fit
from meshgpt.report.facts import Facts
from meshgpt.report.write import read_runs
from meshgpt.report.yardstick import other_text, other_tokens
from meshgpt.settings import settings
from meshgpt.training.trackers import amount

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SETTLED = 0.2  # evaluations in a run's first fifth say more of its warmup than of its size


@settings()
class Arguments:
    """Fits E + A / N^alpha + B / D^beta to the validation losses of runs, and predicts others."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of the runs to fit: several sizes on the same text and tokenizer."""
    predict: tuple[Path, ...] = ()
    """Folders of runs to predict and not to fit, trained already or not yet."""
    points: Literal["auto", "final", "all"] = "auto"
    """Which losses to fit: `final` takes a run's last evaluation, `all` those along the way too, which a decaying
    learning rate makes misleading (Hoffmann et al. 2022, section 3.1), and `auto` all where the learning rate stays
    constant, else the last."""
    count: Counting = "non-embedding"
    """Which parameters are N; below some ten millions, embeddings are most of a model and add little."""
    resamples: int = 200
    """Number of resamples that the intervals are computed from (at least 20)."""
    plot: Path | None = None
    """PNG file to draw measured and fitted losses into; None draws nothing."""

    def __post_init__(self) -> None:
        if self.resamples < 20:
            raise UserError(f"--resamples {self.resamples}: give at least 20, or the interval means nothing")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of one run: loss at its last step, between low and high with 95%. actual: None where it is not trained yet."""

    name: str
    parameters: float
    tokens: float
    loss: float
    low: float
    high: float
    actual: float | None


def size(run: Facts, count: Counting) -> int:
    """N of a run."""
    return run.parameters.total if count == "all" else run.parameters.blocks


def check_comparable(runs: Sequence[Facts]) -> None:
    """Raises UserError for runs whose losses a token no law can hold together."""
    named = [(run.name, run.yardstick) for run in runs]
    if said := other_tokens(named):
        raise UserError(
            f"{said}: their losses are nats for different pieces of text, and their tokens (D) too, so that one law "
            "cannot hold for them. Fit and predict runs of one tokenizer"
        )
    if said := other_text(named):
        raise UserError(
            f"the runs were evaluated on different held-out texts ({said}), so that one law cannot hold for them"
        )


def measured(runs: Sequence[Facts], which: Literal["auto", "final", "all"], count: Counting) -> Points:
    """The points of the runs.

    Raises:
      UserError: a run has no validation loss, or the runs are of different texts or tokenizers.
    """
    check_comparable(runs)
    stores = {run.last("gzip_bits_per_byte") for run in runs}
    if len(stores) > 1:
        raise UserError("the runs were evaluated on different held-out texts, so that one law cannot hold for them")
    table: list[tuple[float, float, float, int]] = []
    for index, run in enumerate(runs):
        steps, losses = run.series("val_loss")
        kept = np.isfinite(losses) & (steps > 0)
        if not kept.any():
            raise UserError(
                f"{run.folder} has no validation loss: evaluate it as it trains (--eval-every), or leave it out"
            )
        steady = isinstance(run.run.optim.schedule, Constant | InverseSqrt)
        if which == "all" or (which == "auto" and steady):
            kept &= steps >= _SETTLED * run.run.last_step
        else:
            kept &= steps == steps[kept].max()
        table += [
            (size(run, count), run.tokens_by(int(step)), loss, index)
            for step, loss in zip(steps[kept], losses[kept], strict=True)
        ]
    n, d, loss, of = (np.array(column) for column in zip(*table, strict=True))
    return Points(parameters=n.astype(float), tokens=d.astype(float), loss=loss.astype(float), run=of.astype(int))


def fitted(points: Points, resamples: int) -> Fit:
    """`scaling_laws.fit`, whose refusals are the user's to mend."""
    try:
        return fit(points, resamples)
    except ValueError as error:
        sizes = len(np.unique(points.parameters))
        raise UserError(
            f"cannot fit a law to {len(points.loss)} losses of {sizes} sizes: {error}. Train more sizes, or train with "
            "a constant learning rate (schedule=Constant() in the recipe), so that every evaluation counts"
        ) from error


def predict(found: Fit, run: Facts, count: Counting) -> Prediction:
    """What the law says of a run at its last planned step, and what came out if it got there."""
    n, d = size(run, count), run.tokens_by(run.run.last_step)
    low, high = found.interval(n, d)
    done = run.finished and run.last("val_loss") is not None
    return Prediction(
        name=run.name,
        parameters=n,
        tokens=d,
        loss=found.law.loss(n, d),
        low=low,
        high=high,
        actual=run.last("val_loss") if done else None,
    )


def describe(found: Fit, points: Points, predictions: Sequence[Prediction], count: Counting) -> str:
    """The law, its constants' intervals, and the predictions."""
    law = found.law
    lines = [f"L(N, D) = {law.E:.4g} + {law.A:.4g} / N^{law.alpha:.4g} + {law.B:.4g} / D^{law.beta:.4g}"]
    counted = "all parameters" if count == "all" else "the parameters of the blocks (embeddings and head left out)"
    lines += [f"N: {counted}; {len(points.loss)} losses of {len(np.unique(points.run))} runs, 95% intervals:"]
    for name in ("E", "A", "B", "alpha", "beta"):
        low, high = found.interval_of(name)
        lines.append(f"  {name:<6} {getattr(law, name):<10.4g} {low:.4g} to {high:.4g}")
    lines.append(f"  misses the measured losses by {found.residual:.2%} (root mean square)")
    for made in predictions:
        text = f"{made.name}: N {amount(made.parameters)}, D {amount(made.tokens)}, predicted {made.loss:.4f} nats"
        lines.append(f"{text} ({made.low:.4f} to {made.high:.4f}), perplexity {math.exp(made.loss):.2f}")
        if made.actual is None:
            lines.append("  not trained to its end yet")
        else:
            error = made.loss / made.actual - 1
            inside = "inside" if made.low <= made.actual <= made.high else "outside"
            lines.append(
                f"  actual {made.actual:.4f} nats, perplexity {math.exp(made.actual):.2f}: the prediction is "
                f"{abs(error):.2%} too {'high' if error > 0 else 'low'}, the actual loss {inside} the interval"
            )
    return "\n".join(lines)


def next_size(found: Fit, points: Points) -> str:
    """What the law says of twice the largest size, with as many tokens a parameter as that run had."""
    largest = int(np.argmax(points.parameters))
    ratio = points.tokens[points.run == points.run[largest]].max() / points.parameters[largest]
    n = 2 * points.parameters[largest]
    low, high = found.interval(n, n * ratio)
    text = f"the next size, N {amount(n)} on {amount(n * ratio)} tokens: {found.law.loss(n, n * ratio):.4f} nats"
    return f"{text} ({low:.4f} to {high:.4f})"


def draw(found: Fit, points: Points, predictions: Sequence[Prediction], out: Path) -> None:
    """Losses against tokens, a colour a size: points measured, lines fitted; what was predicted and what came out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _curves(axes, found, points, predictions)
    for made in predictions:
        error = [[made.loss - made.low], [made.high - made.loss]]
        axes.errorbar([made.tokens], [made.loss], yerr=np.maximum(error, 0), fmt="D", color="black", capsize=4,
                      label=f"predicted, N {amount(made.parameters)}", zorder=4)  # fmt: skip
        if made.actual is not None:
            axes.plot([made.tokens], [made.actual], "*", color="#d1495b", markersize=13, label="actual", zorder=5)
    axes.set_xscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title("Fitted scaling law", loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as scratch:
        figure.savefig(scratch, format=out.suffix[1:] or "png", metadata={"Software": None})


def _curves(axes: Axes, found: Fit, points: Points, predictions: Sequence[Prediction]) -> None:
    import matplotlib

    sizes = np.unique([*points.parameters, *(made.parameters for made in predictions)])
    colors = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.88, len(sizes)))
    for n, color in zip(sizes, colors, strict=True):
        own = points.parameters == n
        ends = [*points.tokens[own], *(made.tokens for made in predictions if made.parameters == n)]
        tokens = np.geomspace(min(min(ends), max(ends) / 5), max(ends), 60)
        axes.plot(tokens, [found.law.loss(n, d) for d in tokens], color=color, linewidth=1.4, alpha=0.8)
        axes.plot(points.tokens[own], points.loss[own], "o", color=color, markersize=4.5,
                  label=f"N {amount(n)}" if own.any() else None)  # fmt: skip


def command(arguments: Sequence[str]) -> None:
    """meshgpt plan fit RUN... [--predict RUN...]"""
    import jax

    asked = flags.parse(Arguments, arguments, "meshgpt plan fit")
    if not asked.runs:
        raise UserError("which runs? give several of different sizes: meshgpt plan fit runs/a runs/b runs/c")
    jax.config.update("jax_platforms", "cpu")  # an accelerator here belongs to whatever is training
    runs = read_runs([*asked.runs, *asked.predict])
    check_comparable(runs)
    points = measured(runs[: len(asked.runs)], asked.points, asked.count)
    found = fitted(points, asked.resamples)
    predictions = [predict(found, run, asked.count) for run in runs[len(asked.runs) :]]
    print(describe(found, points, predictions, asked.count))
    print(next_size(found, points))
    if asked.plot is not None:
        draw(found, points, predictions, asked.plot)
        print(f"{asked.plot}")
