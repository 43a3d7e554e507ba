"""`meshgpt sweep RECIPE --flag VALUES ...`."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from meshgpt import recipe
from meshgpt.config import Run
from meshgpt.data.prepare import Prepare, prepare
from meshgpt.errors import UserError
from meshgpt.settings import settings
from meshgpt.sweep.outcome import conclude
from meshgpt.sweep.runner import run_all
from meshgpt.sweep.space import Axis, Point, at_random, grid, split
from meshgpt.sweep.trials import Plan, Sweep, Trial
from meshgpt.training.trackers import progress_bar


@settings()
class Arguments:
    """Trains a recipe with each of several values of its flags, here or one trial at a time on each of several hosts.

    For example: meshgpt sweep RECIPE --optim.peak-lr 1e-4:1e-2:log:5 --global-batch 32,64

    A flag of the recipe is swept where it is given several values: 1e-4:1e-2:log:5 (five on a logarithmic scale),
    0:0.2:lin:3, or 32,64,128. Every other flag of the recipe stays as given, and so does a text with spaces. The same
    command goes on where it stopped; each trial is a run of its own in the sweep's folder.
    """

    method: Literal["grid", "random", "halving"] = "grid"
    """Which trials are made: `grid` makes every combination, `random` as many as --trials, drawn from the ranges, and
    `halving` is successive halving (Jamieson and Talwalkar 2016): all of the grid, or --trials at random, for
    steps / ETA^r, then the best 1 / ETA of them for ETA times as long, and so on."""
    trials: int = 0
    """Number of trials that are drawn at random; 0 makes the grid."""
    eta: int = 3
    """Factor by which --method halving takes fewer trials and trains longer, at least 2."""
    seed_of_draw: int = 0
    """Seed of the draw of the trials."""
    metric: str = "val_loss"
    """Figure of metrics.jsonl whose last value decides; the lower the better."""
    maximize: bool = False
    """Take the trial with the highest metric instead."""
    out: str = ""
    """Folder of the sweep; when it is empty, runs/sweep-RECIPE."""
    hosts: str = ""
    """Hosts that train one trial at a time each, by --command, separated by commas."""
    command: str = ""
    """Line of bash that starts a trial on a host, with {host} and {command} in it, such as
    "ssh {host} 'cd /shared/meshgpt && {command}'"; the sweep's folder has to be shared."""
    dry_run: bool = False
    """Print the trials and train none."""

    def __post_init__(self) -> None:
        if self.trials < 0 or (self.method == "random" and not self.trials):
            raise UserError("--method random: how many? give --trials N, at least 1")
        if self.trials and self.method == "grid":
            raise UserError("--trials is for --method random or halving; a grid has as many as its values make")
        if self.eta < 2:
            raise UserError(f"--eta {self.eta}: give at least 2")
        if bool(self.hosts) != bool(self.command):
            raise UserError("--hosts and --command go together: which hosts, and the line that starts a trial on one")
        if self.command and "{command}" not in self.command:
            raise UserError(f"--command {self.command!r} has no {{command}} in it, and would train nothing")


def sweep(arguments: Sequence[str]) -> None:
    """meshgpt sweep RECIPE --flag VALUES"""
    asked, rest = recipe.take(Arguments, arguments, "meshgpt sweep")
    axes, fixed = split(rest[1:])
    if not axes:
        raise UserError("nothing to sweep: give a flag several values, as --optim.peak-lr 1e-4:1e-2:log:5")
    points = _points(asked, axes)
    run = _checked(rest[0], fixed, points)
    folder = Path(asked.out or f"runs/sweep-{Path(rest[0].partition(':')[0]).stem}")
    text = _shared_text(run, axes, folder)
    if text is not None:
        fixed = (*fixed, "--data.prepare.out", text.out)
    plan = Plan(
        recipe=rest[0], fixed=fixed, axes=tuple(f"{axis.flag} {','.join(axis.values)}" for axis in axes),
        method=asked.method, count=len(points), seed=asked.seed_of_draw, metric=asked.metric, maximize=asked.maximize,
        eta=asked.eta if asked.method == "halving" else 0,
    )  # fmt: skip
    going = Sweep(folder, plan)
    rungs = _rungs(asked, run.steps, len(points))
    if asked.dry_run:
        for number, point in enumerate(points, start=1):
            print(Trial(number=number, point=point, steps=rungs[0][0]))
        return
    hosts = asked.hosts.split(",") if asked.hosts else []
    if text is not None and len(hosts) > 1:  # now, and not by all of them at once
        with progress_bar() as report:
            prepare(text, report)

    def train(trials: Sequence[Trial]) -> None:
        run_all(going, trials, asked.command, hosts, lambda text: print(text, flush=True))

    climb(going, points, rungs, train)
    print("\n".join(conclude(going, axes)))
    if going.best() is None:
        raise UserError(f"every trial failed: the logs are in {going.folder}")


def _checked(path: str, fixed: Sequence[str], points: Sequence[Point]) -> Run:
    """The first point's run; a value that the recipe does not take is told now, and not when its trial begins."""
    run = recipe.parse([path, *fixed, *_words(points[0])], "meshgpt sweep")
    seen = set(points[0])
    for point in points[1:]:
        if not seen.issuperset(point):
            seen.update(point)
            recipe.parse([path, *fixed, *_words(point)], "meshgpt sweep")
    return run


def _shared_text(run: Run, axes: Sequence[Axis], folder: Path) -> Prepare | None:
    """What all trials read and is prepared once, not in each trial's folder; None where there is no such thing."""
    text = run.data.prepare
    if text is None or run.data.store or any(axis.flag.startswith("--data.prepare.") for axis in axes):
        return None
    return text if text.out else dataclasses.replace(text, out=str(folder.with_name(f"{folder.name}-data")))


def _words(point: Point) -> list[str]:
    return [word for pair in point for word in pair]


def _points(asked: Arguments, axes: Sequence[Axis]) -> list[Point]:
    if asked.trials:
        return at_random(axes, asked.trials, asked.seed_of_draw)
    return grid(axes)


def _rungs(asked: Arguments, steps: int, count: int) -> list[tuple[int | None, int]]:
    """(steps of each trial, how many trials) of each rung; the last trains as long as the recipe says."""
    if asked.method != "halving":
        return [(None, count)]
    rungs: list[tuple[int | None, int]] = [
        (steps, max(1, count // asked.eta ** (levels := int(math.log(count, asked.eta) + 1e-9))))
    ]
    for level in range(1, levels + 1):
        shorter = steps // asked.eta**level
        if shorter < 1:
            break
        rungs.insert(0, (shorter, max(1, count // asked.eta ** (levels - level))))
    return rungs


def climb(
    going: Sweep, points: Sequence[Point], rungs: Sequence[tuple[int | None, int]],
    train: Callable[[Sequence[Trial]], None],
) -> None:  # fmt: skip
    """Trains the first rung, then the best of it on the next one, and so on; each trial afresh, on its own schedule."""
    chosen = list(points)
    for rung, (steps, count) in enumerate(rungs):
        trials = [trial for trial in going.trials if trial.rung == rung]
        if not trials:
            for point in chosen[:count] if rung else chosen:
                going.add(Trial(number=len(going.trials) + 1, point=point, rung=rung, steps=steps))
            going.save()
            trials = [trial for trial in going.trials if trial.rung == rung]
        train(trials)
        chosen = [trial.point for trial in going.ranked(rung) if trial.score is not None]
        if not chosen:
            return
