"""A run's loss curve as a PNG file, drawn from its `metrics.jsonl`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from meshgpt.atomic import replacing
from meshgpt.errors import UserError
from meshgpt.evals.intervals import held_out_part
from meshgpt.training.trackers import amount, read_json_lines

if TYPE_CHECKING:  # matplotlib takes half a second to import
    from matplotlib.axes import Axes

TRAIN, VALIDATION, REFERENCE, INK = "#2a6fbb", "#d1495b", "#6b7280", "#1f2933"


_WINDOWS = 40  # the smoothed curve averages over about this share of the run's steps


_HEAD_ROOM = 1.05


def plot_loss(metrics_path: Path, out_png: Path, title: str) -> None:
    """Draws training loss (each logged step faint, their running mean strong) and validation loss against tokens.

    Where the file has `val_bits_per_byte` a second axis gives it; it is proportional to the loss on one held-out text.
    A step whose loss is not finite (null) is a gap. A file cut mid-line is read up to there.

    Raises:
      UserError: if the file is missing or holds no finite loss.
    """
    rows = read_json_lines(metrics_path)
    tokens, loss = _series(rows, "loss")
    val_tokens, val_loss = _series([row for row in rows if "val_loss" in row], "val_loss")
    if not np.isfinite(loss).any() and not np.isfinite(val_loss).any():
        why = "has no step with a finite loss yet" if metrics_path.exists() else "does not exist"
        raise UserError(f"no loss curve: {metrics_path} {why}; train for some steps first")

    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: it would look for a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    style_axes(axes, title)
    if np.isfinite(loss).any():
        axes.plot(tokens, loss, color=TRAIN, alpha=0.28, linewidth=0.9)
        label = f"training, {_last(smooth(loss)):.3f} at the end"
        axes.plot(tokens, smooth(loss), color=TRAIN, linewidth=2.0, label=label)
    if np.isfinite(val_loss).any():
        part = next((held_out_part(row) for row in reversed(rows) if "val_loss" in row), None)
        of = f" on {part}" if part is not None and part.limited else ""
        label = f"validation{of}, {_last(val_loss):.3f} at the end"
        axes.plot(val_tokens, val_loss, color=VALIDATION, linewidth=1.6, marker="o", markersize=4.5, label=label)
    fit_axes(axes, np.concatenate([tokens, val_tokens]), np.concatenate([smooth(loss), val_loss]))
    _bits_per_byte(axes, rows)
    axes.legend(frameon=False, loc="upper right", labelcolor=INK)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out_png) as scratch:
        figure.savefig(scratch, format="png", metadata={"Software": None})


def plain_label(label: str) -> str:
    """`label` for matplotlib, which takes dollars for mathematics and hides what begins with an underscore."""
    return ("\u2009" if label.startswith("_") else "") + label.replace("$", r"\$")


def smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over about a fortieth of `values`, which leaves out NaN and is NaN where they are.

    Centred; the window shrinks towards the start, where the loss falls fast, and is cut off at the end.
    """
    index = np.arange(len(values))
    half = max(1, len(values) // (2 * _WINDOWS))
    first = np.maximum(index - half, 0)
    stop = np.minimum(np.minimum(2 * index, index + half) + 1, len(values))
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    means = (sums[stop] - sums[first]) / np.maximum(counts[stop] - counts[first], 1)
    return np.where(finite, means, np.nan)


def _series(rows: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, values) of the rows; what is absent or no number is NaN, and a row without tokens counts by its step."""
    tokens = [_number(row.get("tokens", row["step"])) for row in rows]
    return np.array(tokens, dtype=float), np.array([_number(row.get(key)) for row in rows], dtype=float)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def _last(values: np.ndarray) -> float:
    """The last finite one of `values`."""
    return float(values[np.isfinite(values)][-1])


def style_axes(axes: Axes, title: str) -> None:
    axes.set_title(plain_label(title), loc="left", color=INK, fontsize=13, fontweight="bold", pad=12)
    axes.set_xlabel("tokens", color=INK)
    axes.set_ylabel("loss (nats per token)", color=INK)
    axes.xaxis.set_major_formatter(lambda value, _: _tick(value))
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa5b1")
    axes.tick_params(colors=INK, length=3)


def _tick(tokens: float) -> str:
    """`1.5M`, and `2M` rather than `2.00M`; `1.5e+18` for numbers that have no name."""
    if tokens >= 1e15:
        return f"{tokens:.3g}"
    text = amount(tokens)
    digits, suffix = text.rstrip("kMBT"), text.lstrip("0123456789.")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + suffix


def fit_axes(axes: Axes, tokens: np.ndarray, curve: np.ndarray) -> None:
    """Fits the axes to the curves, so that one spike of a single step does not flatten the rest."""
    low, high = np.nanmin(curve), np.nanmax(curve)
    margin = (high - low) * (_HEAD_ROOM - 1) or abs(low) * 0.01 or 0.01
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(0, max(float(np.nanmax(tokens)), 1.0) * 1.02)


def _bits_per_byte(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Adds bits per byte on the right, and what gzip needs where that fits in."""
    known = [row for row in rows if _number(row.get("val_bits_per_byte")) > 0 and _number(row.get("val_loss")) > 0]
    if not known:
        return
    factor = known[-1]["val_bits_per_byte"] / known[-1]["val_loss"]
    right = axes.secondary_yaxis("right", functions=(lambda nats: nats * factor, lambda bits: bits / factor))
    right.set_ylabel("bits per byte of the validation text", color=INK)
    right.tick_params(colors=INK, length=3)
    right.spines["right"].set_color("#9aa5b1")
    gzip = _number(known[-1].get("gzip_bits_per_byte"))
    low, high = axes.get_ylim()
    if low < gzip / factor < high:
        axes.axhline(gzip / factor, color=REFERENCE, linewidth=1.2, linestyle=(0, (4, 3)))
        text = f"gzip -9: {gzip:.3f} bits per byte"
        place = axes.get_yaxis_transform()  # x as a fraction of the width, y in nats
        axes.text(0.99, gzip / factor, text, transform=place, ha="right", va="bottom", color=REFERENCE, fontsize=9)
