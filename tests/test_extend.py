"""Runs that go on beyond their schedule: what they train at, what is recorded and said; tries that are too short."""

import itertools
import json
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from runs import Here, copied

from meshgpt.config import may_change, may_differ
from meshgpt.errors import UserError
from meshgpt.optim.config import AdamW, Constant, Cosine, InverseSqrt, Linear, Piece, Piecewise, Schedule, learning_rate
from meshgpt.optim.schedules import Extension, fitting_warmup
from meshgpt.training import loop

PEAK = 3e-3
QUIET = ("--export", "none", "--samples.prompts", "--eval-every", 50)


def rates(schedule: Schedule, steps: int, extension: Extension = Extension(), warmup: int = 4) -> np.ndarray:
    rate = learning_rate(AdamW(peak_lr=PEAK, warmup_steps=warmup, schedule=schedule), steps, extension)
    with jax.numpy_dtype_promotion("standard"):
        return np.asarray(rate(np.arange(steps + extension.steps)), np.float64)


@pytest.mark.parametrize("schedule", [Cosine(), Linear(final=0.3), InverseSqrt(), Constant()], ids=str)
def test_an_extension_stays_at_the_rate_of_the_end(schedule: Schedule) -> None:
    longer = rates(schedule, 40, Extension(25))
    np.testing.assert_array_equal(longer[:40], rates(schedule, 40))
    ends = {Cosine: 0.1, Linear: 0.3, InverseSqrt: (4 / 40) ** 0.5, Constant: 1.0}
    np.testing.assert_allclose(longer[40:], ends[type(schedule)] * PEAK, rtol=1e-5)


def test_a_rewarmed_extension_rises_to_the_peak_and_decays_again() -> None:
    longer = rates(Cosine(final=0.1), 40, Extension(100, "rewarmed"))
    np.testing.assert_array_equal(longer[:40], rates(Cosine(final=0.1), 40))
    rise = 0.1 + 0.9 * np.arange(1, 11) / 10
    fall = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(90) / 90)) / 2
    np.testing.assert_allclose(longer[40:] / PEAK, [*rise, *fall], rtol=1e-4)
    assert rates(Linear(), 40, Extension(1, "rewarmed"))[40] == pytest.approx(PEAK, rel=1e-5)


def test_extensions_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"ends at a learning rate of 0; .* --extend-schedule rewarmed"):
        rates(Linear(), 40, Extension(5))
    pieces = Piecewise(pieces=(Piece(steps=4, to=1.0), Piece(steps=30, to=0.0)))
    with pytest.raises(UserError, match=r"extend_schedule=rewarmed: a piecewise schedule"):
        rates(pieces, 40, Extension(5, "rewarmed"))


@pytest.mark.parametrize(("warmup", "steps", "fits"), [(100, 60, 6), (10, 10, 1), (5, 5, 0), (1, 1, 0), (9, 10, 9)])
def test_a_warmup_that_outlasts_the_run_is_shortened(warmup: int, steps: int, fits: int) -> None:
    assert fitting_warmup(warmup, steps) == fits
    short = rates(Cosine(final=0.1), steps, warmup=warmup)
    np.testing.assert_allclose(short[:fits], PEAK * np.arange(1, fits + 1) / max(fits, 1), rtol=1e-5)
    assert short[fits] == pytest.approx(PEAK, rel=1e-5)


def test_twice_the_steps_after_a_decay_is_said_and_recorded(here: Here, finished: Path, tmp_path: Path) -> None:
    run, recipe = copied(finished, tmp_path / "run"), here.workshop.recipe(tmp_path)
    shown = here.train(recipe, "--run-dir", run).out
    assert "longer: --extend 20 goes on from here at the final learning rate, 0.0003 (--steps 40 would set it" in shown
    ended = here.train(recipe, "--run-dir", run, "--steps", 40, *QUIET)
    assert ended.code == 0, ended
    rows = {row["step"]: row["learning_rate"] for row in runs.rows(run) if "learning_rate" in row}
    jump = f"learning rate: {rows[21]:.3g} at step 21, where the schedule so far had 0.0003"
    assert rows[21] > 1.5e-3
    assert jump in ended.out
    assert "without it: --steps 20 --extend 20" in ended.out
    (entry,) = json.loads((run / "run.json").read_text())["history"]
    assert entry["step"] == 20
    assert entry["changes"] == {"steps": [20, 40]}
    assert entry["notes"][0].startswith(jump)
    card = here.cli("report", run)
    assert card.code == 0, card
    assert "Changed at step 20 | steps 40 (was 20)" in (run / "report/README.md").read_text()


def test_an_extended_run_keeps_its_rate_and_goes_on_after_a_stop(here: Here, finished: Path, tmp_path: Path) -> None:
    run, recipe = copied(finished, tmp_path / "run"), here.workshop.recipe(tmp_path)
    flags = ("--run-dir", run, "--extend", 6, *QUIET)
    ended = here.train(recipe, *flags)
    assert ended.code == 0, ended
    assert "learning rate:" not in ended.out
    again = here.train(recipe, *flags)
    assert "this run is finished: step 26 of 26" in again.out
    assert "longer: --extend 26" in again.out
    ended = here.train(recipe, "--run-dir", run, "--extend", 10, *QUIET)
    assert ended.code == 0, ended
    rows = {row["step"]: row["learning_rate"] for row in runs.rows(run) if "learning_rate" in row}
    assert sorted(rows) == list(range(1, 31))
    assert [rows[step] for step in range(21, 31)] == pytest.approx([3e-4] * 10, rel=1e-5)
    assert json.loads((run / "run.json").read_text())["history"] == []
    assert here.cli("report", run).code == 0
    assert "then 10 steps more, at the rate it ended with" in (run / "report/README.md").read_text()


def test_a_short_try_of_a_recipe_says_that_its_warmup_is_shorter(here: Here, tmp_path: Path) -> None:
    ended = here.train(here.workshop.recipe(tmp_path), "--run-dir", tmp_path / "run", "--steps", 3, *QUIET)
    assert ended.code == 0, ended
    assert "a warmup of 4 steps does not fit into a run of 3: shortened to 0" in ended.out


LOCKED = {
    *("model", "data.prepare.sources", "data.mixture", "data.packing", "data.mask_documents", "seq_len", "seed"),
    *("trainable", "objective"),
}
ASKED_FOR = {"optim", "precision", "global_batch", "init"}
FREE = {
    *("steps", "extend", "extend_schedule", "accumulate", "execution", "mesh", "eval_every", "eval_batches", "evals"),
    *("log_every", "sinks", "max_bad_steps", "check_replicas_every", "checkpointing", "samples", "export", "run_dir"),
    *("resume", "resume_with_changes", "data.store", "data.prepare.workers", "data.prepare.overwrite"),
}


def test_what_may_change_on_resume_is_what_is_written_here(here: Here, finished: Path) -> None:
    """A new field of a run is locked unless somebody decides otherwise, here and in the configuration."""
    run = json.loads((finished / "run.json").read_text())["run"]
    top = {name for name in run if name not in ("type", "data")}
    assert {name for name in top if may_differ(name)} == {name for name in FREE if not name.startswith("data.")}
    assert {name for name in top if may_change(name)} == ASKED_FOR
    assert all(may_differ(name) for name in FREE)
    assert not any(may_differ(name) or may_change(name) for name in LOCKED)
    assert top - FREE - ASKED_FOR == {name for name in LOCKED if not name.startswith("data.")}
    assert not any(may_differ(f"data.{name}") for name in run["data"] if f"data.{name}" not in FREE)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_throughput_counts_every_microbatch(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    """With a clock that ticks a second at each look: a step of 8 x 32 tokens is 256 tokens/s, however it is cut."""
    ticks = itertools.count()
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: float(next(ticks))))
    run = tmp_path / "run"
    ended = here.train(
        here.workshop.recipe(tmp_path), "--run-dir", run, "--steps", 4, "--accumulate", accumulate, "--mesh.tensor", 4,
        *QUIET,
    )  # fmt: skip
    assert ended.code == 0, ended
    rows = [row for row in runs.rows(run) if "tokens_per_second" in row]
    assert [row["tokens"] for row in rows] == [256, 512, 768, 1024]
    assert [row["tokens_per_second"] for row in rows[:3]] == [256.0] * 3
