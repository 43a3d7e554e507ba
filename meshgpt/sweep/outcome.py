"""What a sweep found: a table, the comparison of its runs, a picture, and the best configuration as a recipe."""

import math
from collections.abc import Sequence
from pathlib import Path

from meshgpt.atomic import write_atomically
from meshgpt.report.card import CardOptions
from meshgpt.report.write import read_runs, write_report
from meshgpt.sweep.picture import draw
from meshgpt.sweep.space import Axis
from meshgpt.sweep.trials import Sweep, Trial

_COMPARED = 12  # runs in one report: more curves than that cannot be told apart


def conclude(sweep: Sweep, axes: Sequence[Axis]) -> list[str]:
    """Writes `best.py` (a recipe), `sweep.png` and `comparison/` into the sweep's folder; gives lines for a reader."""
    ranked, best = sweep.ranked(), sweep.best()
    lines = table(sweep)
    scored = [trial for trial in ranked if trial.score is not None]
    if best is None:
        return lines
    recipe = sweep.folder / "best.py"
    write_atomically(recipe, as_recipe(sweep, best))
    picture = sweep.folder / "sweep.png"
    draw(picture, sweep.plan.metric, {axis.flag: _columns(axis, scored) for axis in axes}, sweep.plan.maximize)
    last = [trial for trial in scored if trial.rung == best.rung][:_COMPARED]
    runs = read_runs([sweep.run_dir(trial) for trial in last])
    compared = write_report(runs, sweep.folder / "comparison", CardOptions())
    return [
        *lines,
        f"best: {best} ({sweep.plan.metric} {best.score:.4f})",
        f"  {recipe}  the recipe with these values",
        f"  {picture}  {sweep.plan.metric} against each flag",
        f"  {compared[1]}  the {len(last)} best runs side by side; opens in any browser",
    ]


def _columns(axis: Axis, trials: Sequence[Trial]) -> tuple[list[str], list[float], bool]:
    """(value, score) of each trial along one axis, and whether the axis is logarithmic."""
    values = [dict(trial.point)[axis.flag] for trial in trials]
    return values, [math.nan if trial.score is None else trial.score for trial in trials], axis.scale == "log"


def table(sweep: Sweep) -> list[str]:
    """The trials, best first; of successive halving those that trained longest first."""
    rungs = sorted({trial.rung for trial in sweep.trials}, reverse=True)
    rows = [trial for rung in rungs for trial in sweep.ranked(rung)]
    lines = [f"{sweep.plan.metric:>12}  trial"]
    for trial in rows:
        value = "failed" if trial.score is None else f"{trial.score:.4f}"
        lines.append(f"{value:>12}  {trial.name}: {trial}{'  ' + trial.failed if trial.failed else ''}")
    return lines


def as_recipe(sweep: Sweep, best: Trial) -> str:
    """A recipe that is the sweep's with the best trial's values (and the recipe's own number of steps)."""
    flags = [*sweep.plan.fixed, *(word for pair in best.point for word in pair)]
    origin, _, _ = sweep.plan.recipe.partition(":")
    path = str(Path(origin).resolve()) + sweep.plan.recipe.removeprefix(origin)
    written = "".join(f"    {flag!r},\n" for flag in flags)
    return f'''"""The best of {len(sweep.trials)} trials: {sweep.plan.metric} {best.score:.4f} in {best.name}.

Written by `meshgpt sweep`: FLAGS are those that it was given for all trials, and then the values that it found.
"""

import dataclasses

from meshgpt import recipe
from meshgpt.config import Run

FLAGS = (
{written})


def config() -> Run:
    run = recipe.parse([{path!r}, *FLAGS], "best")
    return dataclasses.replace(run, run_dir="")
'''
