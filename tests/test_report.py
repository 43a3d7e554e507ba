"""The loss curve: what it says, what it leaves out, and files that broke off."""

import json
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from meshgpt.errors import UserError
from meshgpt.report.panels import Panel, Series
from meshgpt.report.plots import draw_panel
from meshgpt.training.loss_curve import plot_loss, smooth


def write(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def run(steps=200):
    """Rows of a run that falls from 8 nats to 3, validated every 50 steps; 3.2 bytes a token."""
    for step in range(1, steps + 1):
        loss = 3 + 5 * math.exp(-step / 30) + 0.1 * math.sin(step)
        row = {"step": step, "tokens": step * 1024, "loss": loss}
        if step % 50 == 0:
            bits = loss / math.log(2) / 3.2
            row |= {"val_loss": loss, "val_bits_per_byte": bits, "gzip_bits_per_byte": 2.0}
        yield row


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, to look at what they hold."""
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    return drawn


def test_the_curve_has_both_losses_and_bits_per_byte(tmp_path, figures):
    rows = list(run())
    plot_loss(write(tmp_path / "metrics.jsonl", rows), tmp_path / "new" / "loss.png", "a [run] $5")
    with Image.open(tmp_path / "new" / "loss.png") as image:
        assert image.size == (1440, 832)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50
    (axes,) = figures[0].axes
    raw, mean, validation, gzip = axes.lines
    assert raw.get_ydata() == pytest.approx([row["loss"] for row in rows])
    assert raw.get_xdata() == pytest.approx([row["tokens"] for row in rows])
    assert np.std(np.diff(mean.get_ydata())[100:]) < np.std(np.diff(raw.get_ydata())[100:])
    assert validation.get_xdata() == pytest.approx([51200, 102400, 153600, 204800])
    assert gzip.get_ydata()[0] == pytest.approx(2.0 * math.log(2) * 3.2)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[1] == f"validation, {rows[-1]['val_loss']:.3f} at the end"
    assert labels[0] == f"training, {np.mean([row['loss'] for row in rows[-3:]]):.3f} at the end"
    (right,) = axes.child_axes
    figures[0].canvas.draw()
    assert right.get_ylim() == pytest.approx([nats / math.log(2) / 3.2 for nats in axes.get_ylim()])


def test_steps_that_are_not_finite_are_gaps_and_a_torn_end_is_left_out(tmp_path, figures):
    rows = list(run(40))
    rows[10]["loss"] = None
    rows[11]["loss"] = "much"
    path = write(tmp_path / "metrics.jsonl", rows, tail='{"step": 41, "tok')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_loss(path, tmp_path / "loss.png", "gaps")
    for line in figures[0].axes[0].lines[:2]:
        assert len(line.get_ydata()) == 40
        assert np.flatnonzero(np.isnan(line.get_ydata())).tolist() == [10, 11]


def test_one_spike_does_not_flatten_the_curve(tmp_path, figures):
    rows = list(run())
    rows[150]["loss"] = 200.0
    plot_loss(write(tmp_path / "metrics.jsonl", rows), tmp_path / "loss.png", "spike")
    assert figures[0].axes[0].get_ylim()[1] < 60


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 0, "loss": 3.0}],
        [{"step": 5, "tokens": 99, "val_loss": 2.0}],
        [{"step": 1, "loss": 3.0, "val_loss": None, "val_bits_per_byte": None}],
        [{"step": 1, "loss": None}, {"step": 2, "loss": 2.0, "val_loss": 0.0, "val_bits_per_byte": 0.0}],
    ],
)
def test_little_is_enough(tmp_path, rows):
    plot_loss(write(tmp_path / "metrics.jsonl", rows), tmp_path / "loss.png", "short")
    assert (tmp_path / "loss.png").stat().st_size > 5000


def test_nothing_to_draw_is_said(tmp_path):
    missing = tmp_path / "metrics.jsonl"
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        plot_loss(missing, tmp_path / "loss.png", "")
    write(missing, [{"step": 1, "loss": None}])
    with pytest.raises(UserError, match=r"metrics\.jsonl has no step with a finite loss yet"):
        plot_loss(missing, tmp_path / "loss.png", "")
    assert not (tmp_path / "loss.png").exists()


def test_equal_runs_draw_equal_files(tmp_path):
    path = write(tmp_path / "metrics.jsonl", run(30))
    for name in ("a.png", "b.png"):
        plot_loss(path, tmp_path / name, "same")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("length", [0, 1, 2, 79, 80, 81, 1000])
def test_smooth_is_the_mean_of_its_window(length):
    values = np.random.default_rng(length).normal(size=length)
    values[length // 3 : length // 3 + 2] = np.nan
    half = max(1, length // 80)
    expected = [
        np.nan if np.isnan(values[i]) else np.nanmean(values[max(i - half, 0) : min(2 * i, i + half) + 1])
        for i in range(length)
    ]
    np.testing.assert_allclose(smooth(values), expected, rtol=1e-9, atol=1e-12)


def test_a_panels_labels_are_text_whatever_they_are(tmp_path):
    x = np.arange(5.0)
    label = "_$\\frac$ {x} \N{COLLISION SYMBOL} \\frac"
    curve = Series(label=label, x=x, y=np.array([1.0, np.nan, 2.0, np.nan, 3.0]))
    far = Series(label="", x=x * 1e18, y=x, kind="marked")
    panel = Panel(slug="p", title=label, x_label="FLOPs", y_label="y", series=[curve, far])
    draw_panel(panel, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_importing_it_brings_neither_matplotlib_nor_jax():
    code = "import sys, meshgpt.report; sys.exit('matplotlib' in sys.modules or 'jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
