"""A sweep's record: its plan, and what became of each trial; kept in `sweep.json`, whole at any moment."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from meshgpt.atomic import write_atomically
from meshgpt.errors import UserError
from meshgpt.settings import json_text, settings
from meshgpt.sweep.space import Point

RECORD = "sweep.json"
CRASHED = "exit code "


@dataclasses.dataclass(kw_only=True)
class Trial:
    """One run. rung: of successive halving, 0 for the first. steps: what it trains for, None for the recipe's own.

    score: the metric at its end, None before; `failed` says why there is none.
    """

    number: int
    point: Point
    rung: int = 0
    steps: int | None = None
    score: float | None = None
    failed: str = ""

    @property
    def name(self) -> str:
        return f"trial-{self.number:03d}"

    @property
    def done(self) -> bool:
        return self.score is not None or bool(self.failed)

    @property
    def flags(self) -> list[str]:
        """What makes this trial of the recipe."""
        steps = [] if self.steps is None else ["--steps", str(self.steps)]
        return [word for flag, value in self.point for word in (flag, value)] + steps

    def __str__(self) -> str:
        return " ".join(self.flags)


@settings()
class Plan:
    """What decides a sweep; the same plan in the same folder goes on where it stopped. eta: of successive halving."""

    recipe: str
    fixed: tuple[str, ...]
    axes: tuple[str, ...]
    method: str
    count: int
    seed: int
    metric: str
    maximize: bool
    eta: int = 0


class Sweep:
    """The folder of a sweep.

    Raises:
      UserError: another sweep is in this folder, or something that is none.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        self.trials: list[Trial] = []
        record = folder / RECORD
        if record.is_file():
            self._read(record)
        elif folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no sweep: give another --out")

    def _read(self, record: Path) -> None:
        try:
            kept: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
            old = kept["plan"]
            self.trials = [
                Trial(**{**trial, "point": tuple((flag, value) for flag, value in trial["point"])})
                for trial in kept["trials"]
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{record} is damaged ({error!r}): give another --out") from error
        for trial in self.trials:  # what a machine did to a trial, and not its values, may go well another time
            trial.failed = "" if trial.failed.startswith(CRASHED) else trial.failed
        new = json.loads(json.dumps(dataclasses.asdict(self.plan)))
        if not any(trial.done for trial in self.trials):  # nothing was compared by it yet
            old = old | {name: new[name] for name in ("metric", "maximize")}
        changed = [name for name in new if old.get(name) != new[name]]
        if changed:
            name = changed[0]
            raise UserError(
                f"{self.folder} holds another sweep: {name} was {old.get(name)!r}, now {new[name]!r}. "
                "Give another --out"
            )

    def add(self, trial: Trial) -> None:
        self.trials.append(trial)

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {
            "plan": dataclasses.asdict(self.plan),
            "trials": [dataclasses.asdict(trial) for trial in self.trials],
        }
        write_atomically(self.folder / RECORD, json_text(record, indent=2) + "\n")

    def run_dir(self, trial: Trial) -> Path:
        return self.folder / trial.name

    def ranked(self, rung: int | None = None) -> list[Trial]:
        """The trials that are done, the best first; failed ones last."""
        done = [trial for trial in self.trials if trial.done and rung in (None, trial.rung)]
        sign = -1.0 if self.plan.maximize else 1.0
        return sorted(done, key=lambda trial: math.inf if trial.score is None else sign * trial.score)

    def best(self) -> Trial | None:
        """The best of those that trained longest."""
        scored = [trial for trial in self.trials if trial.score is not None]
        last = max((trial.rung for trial in scored), default=0)
        return next((trial for trial in self.ranked(last) if trial.score is not None), None)
