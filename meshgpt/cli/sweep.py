"""`meshgpt sweep RECIPE --flag VALUES ...`."""

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from meshgpt import recipe
from meshgpt.config import Run
from meshgpt.data.prepare import Prepare, prepare
from meshgpt.errors import UserError
from meshgpt.sweep.outcome import conclude
from meshgpt.sweep.runner import run_all
from meshgpt.sweep.space import Axis, Point, at_random, grid, split
from meshgpt.sweep.trials import Plan, Sweep, Trial
from meshgpt.training.trackers import progress_bar

_USAGE = """usage: meshgpt sweep RECIPE --FLAG VALUES [--FLAG VALUES ...] [options] [flags of the recipe]

VALUES are 1e-4:1e-2:log:5 (five on a logarithmic scale), 0:0.2:lin:3, or 32,64,128. Every other flag of the recipe
stays as given, and so does a text with spaces. The same command goes on where it stopped; each trial is a run of its
own in the sweep's folder.
--method grid       every combination (the default)
--method random     --trials N of them, drawn from the ranges
--method halving    successive halving (Jamieson and Talwalkar 2016): all of the grid, or --trials N at random, for
                    steps / ETA^r, then the best 1 / ETA of them for ETA times as long, and so on; --eta 3
--trials N          how many to draw
--seed-of-draw N    another draw (0)
--metric NAME       what decides, the last value in metrics.jsonl (val_loss); --maximize: the higher the better
--out DIR           the sweep's folder (runs/sweep-RECIPE)
--hosts A,B         one trial at a time on each, by --command
--command TEMPLATE  a line of bash for each trial, with {host} and {command} in it, such as
                    "ssh {host} 'cd /shared/meshgpt && {command}'": the sweep's folder has to be shared
--dry-run           print the trials"""


def sweep(arguments: Sequence[str]) -> None:
    """meshgpt sweep RECIPE --flag VALUES"""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return
    asked, rest = _parse(arguments)
    axes, fixed = split(rest[1:])
    if not axes:
        raise UserError(f"nothing to sweep: give a flag several values, as --optim.peak-lr 1e-4:1e-2:log:5\n{_USAGE}")
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


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--method", choices=("grid", "random", "halving"), default="grid")
    parser.add_argument("--trials", type=int, default=0)
    parser.add_argument("--eta", type=int, default=3)
    parser.add_argument("--seed-of-draw", type=int, default=0)
    parser.add_argument("--metric", default="val_loss")
    parser.add_argument("--maximize", action="store_true")
    parser.add_argument("--out", default="")
    parser.add_argument("--hosts", default="")
    parser.add_argument("--command", default="")
    parser.add_argument("--dry-run", action="store_true")
    asked, rest = recipe.take_flags(parser, arguments, _USAGE)
    if asked.trials < 0 or (asked.method == "random" and not asked.trials):
        raise UserError("--method random: how many? give --trials N, at least 1")
    if asked.trials and asked.method == "grid":
        raise UserError("--trials is for --method random or halving; a grid has as many as its values make")
    if asked.eta < 2:
        raise UserError(f"--eta {asked.eta}: give at least 2")
    if bool(asked.hosts) != bool(asked.command):
        raise UserError("--hosts and --command go together: which hosts, and the line that starts a trial on one")
    if asked.command and "{command}" not in asked.command:
        raise UserError(f"--command {asked.command!r} has no {{command}} in it, and would train nothing")
    if not rest or rest[0].startswith("-"):
        raise UserError(f"which recipe?\n{_USAGE}")
    return asked, rest


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


def _points(asked: argparse.Namespace, axes: Sequence[Axis]) -> list[Point]:
    if asked.trials:
        return at_random(axes, asked.trials, asked.seed_of_draw)
    return grid(axes)


def _rungs(asked: argparse.Namespace, steps: int, count: int) -> list[tuple[int | None, int]]:
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
