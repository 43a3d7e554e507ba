"""`meshgpt chaos RECIPE --kills N --seed S`."""

import collections
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from meshgpt import recipe, runtime
from meshgpt.atomic import write_atomically
from meshgpt.chaos import proof
from meshgpt.chaos.disk import Disk, small_disk
from meshgpt.chaos.faults import Fault, Injector, plan
from meshgpt.chaos.worker import VARIABLE
from meshgpt.cli import launch
from meshgpt.config import Run
from meshgpt.distributed.heartbeat import HangTimeouts
from meshgpt.distributed.supervisor import Layout, Patience, Supervisor
from meshgpt.errors import UserError
from meshgpt.models.model import check_divisibility
from meshgpt.settings import json_text, settings
from meshgpt.training.trackers import duration

_STEPS_A_FAULT, _SAVE_EVERY = 8, 4
_PATIENCE = Patience(
    max_restarts=20, timeouts=HangTimeouts(seconds=10.0, start=300.0, busy=60.0), pause=0.1, poll=0.01, grace=60.0
)
_DISK_BYTES = 256 << 20


@settings()
class Arguments:
    """Trains a recipe twice on a pod of processes on this machine, undisturbed and disturbed, and compares the ends.

    In the disturbed run random processes are killed in steps, saves and start-up, or stopped, the disk is filled, the
    newest checkpoint damaged, and the storage slowed. Both runs must have ended alike, and every sequence must have
    been fed as the run's order says; the exit code is 0 if they have.

    Unless the recipe's flags say otherwise it takes 8 steps a fault, saves every 4, logs every one, and neither samples
    nor exports. As root the disturbed run is on a small tmpfs, whose space is taken; otherwise a file size limit stands
    in. `meshgpt chaos RECIPE --help` lists the flags of the recipe.
    """

    kills: int = 20
    """Number of faults."""
    seed: int = 0
    """Seed of which faults, in which order, and to whom; their moments are not repeatable to the instant."""
    processes: int = 2
    """Number of processes of the pod."""
    devices: int = 1
    """Number of virtual CPU devices of each process."""
    elastic: bool = False
    """Go on after a death with the processes that remain; the ends are then alike within --tolerance."""
    tolerance: float = 0.001
    """Largest relative difference of parameters and losses that --elastic allows, between 0 and 1."""
    out: Path = Path("runs/chaos")
    """Empty or new folder for both runs and chaos.json, the record of all faults."""

    def __post_init__(self) -> None:
        for name in ("kills", "processes", "devices"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: give at least 1")
        if not 0 < self.tolerance < 1:
            raise UserError(f"--tolerance {self.tolerance:g}: give a number between 0 and 1")


class Trial:
    """Both runs of one command, in the folder `out`."""

    def __init__(self, asked: Arguments, rest: Sequence[str], run: Run) -> None:
        self._asked, self._rest, self._run = asked, list(rest), run
        self.restarts = 0
        self.faults: list[dict] = []

    def train(self, folder: Path, notes: Path, fewer: bool = False, injector: Injector | None = None) -> int:
        """One launch of the run into `folder`; gives the exit code."""
        (notes / "fed").mkdir(parents=True, exist_ok=True)
        os.environ[VARIABLE] = str(notes.absolute())
        rest = [*self._rest, "--run-dir", str(folder)]
        asked = self._asked
        supervisor = Supervisor(
            launch.command(rest, self._run, asked.processes, "meshgpt.chaos.worker"),
            Layout(processes=asked.processes, devices=asked.devices),
            folder,
            _PATIENCE,
            _say,
            fewer=launch.fewer(self._run, asked.devices) if fewer else None,
            look=injector,
            quiet=True,
        )
        code = supervisor.run()
        if supervisor.stopping:
            raise KeyboardInterrupt
        self.restarts += len(supervisor.lives) - 1
        return code

    def undisturbed(self, folder: Path, notes: Path) -> None:
        code = self.train(folder, notes)
        if code:
            raise UserError(f"the undisturbed run ended with code {code}: see {folder / 'logs'}")

    def disturbed(self, disk: Disk, notes: Path, faults: list[Fault]) -> Path:
        """Trains until the run has ended well, again after each full disk; gives its folder."""
        folder = disk.path / "run"
        begun, self.restarts = time.time(), 0

        def done(record: dict) -> None:
            self.faults.append(record | {"seconds": round(time.time() - begun, 2)})
            _say(f"fault {len(self.faults)} of {len(faults)}: {record}")

        injector = Injector(faults, folder / "checkpoints", disk, notes / "slow", done)
        while True:
            code = self.train(folder, notes, self._asked.elastic, injector)
            if code and not injector.disk_is_full:
                raise proof.DiffersError(f"the disturbed run ended with code {code}: see {folder / 'logs'}")
            if not code:
                break
            injector.disk_is_full = False
            disk.free()
            self.restarts += 1
            _say("the run ended on the full disk, which has room again")
        if injector.pending:
            raise UserError(f"the run ended before {len(injector.pending)} of {len(faults)} faults: give more --steps")
        return folder


def chaos(arguments: Sequence[str]) -> int:
    """meshgpt chaos RECIPE; gives the exit code."""
    asked, rest = recipe.take(Arguments, arguments, "meshgpt chaos")
    _check_empty(asked.out)
    run, rest = _settled(asked, rest)
    begun, trial, out = time.monotonic(), Trial(asked, rest, run), asked.out.absolute()
    faults = plan(asked.kills, asked.seed, run.last_step)
    trial.undisturbed(out / "undisturbed", out / "notes-undisturbed")
    _say(f"the undisturbed run took {duration(time.monotonic() - begun)}; now {len(faults)} faults")
    with small_disk(out / "disk", _DISK_BYTES) as disk:
        _say(f"full disks: {'a tmpfs without space' if disk.mounted else 'a file size limit (not root: no tmpfs)'}")
        held, failed = _judged(trial, disk, out, faults, asked.tolerance if asked.elastic else 0.0)
        shutil.copytree(disk.path, out / "disturbed", ignore=shutil.ignore_patterns("filler"))
    verdict = {"seed": asked.seed, "held": held, "failed": failed, "restarts": trial.restarts}
    verdict |= {"seconds": round(time.monotonic() - begun, 1), "faults": trial.faults}
    write_atomically(out / "chaos.json", json_text(verdict, indent=1) + "\n")
    counted = collections.Counter(fault["kind"] for fault in trial.faults)
    print("; ".join(f"{count} x {kind}" for kind, count in sorted(counted.items())))
    print(f"{len(trial.faults)} faults, {trial.restarts} restarts, {duration(time.monotonic() - begun)}")
    print("\n".join([*held, *(f"FAILED: {text}" for text in failed)]))
    return 1 if failed else 0


def _settled(asked: Arguments, rest: list[str]) -> tuple[Run, list[str]]:
    """The run as both launches train it, and its arguments."""
    given = recipe.parse(rest, "meshgpt chaos")
    ours = ["--steps", str(_STEPS_A_FAULT * (asked.kills + 2)), "--checkpointing.every", str(_SAVE_EVERY)]
    ours += ["--log-every", "1", "--export", "none", "--samples.prompts"]
    if given.data.prepare is not None and not given.data.prepare.out:
        ours += ["--data.prepare.out", str((asked.out / "data").absolute())]  # once for both
    rest = [rest[0], *ours, *rest[1:]]
    run = recipe.parse(rest, "meshgpt chaos")
    mesh = run.mesh.resolve(asked.processes * asked.devices)
    check_divisibility(run.model, mesh, run.global_batch, run.accumulate)
    return run, rest


def _judged(trial: Trial, disk: Disk, out: Path, faults: list[Fault], tolerance: float) -> tuple[list[str], list[str]]:
    """Trains the disturbed run and compares it with the other: what holds, and what does not."""
    held, failed = [], []
    try:
        folder = trial.disturbed(disk, out / "notes", faults)
    except proof.DiffersError as error:
        return [], [str(error)]
    runtime.start()
    for compare in (
        lambda: proof.same_state(folder, out / "undisturbed", tolerance),
        lambda: proof.same_history(folder, out / "undisturbed", tolerance),
        lambda: proof.fed_once(folder, out / "notes" / "fed"),
    ):
        try:
            held.append(compare())
        except proof.DiffersError as error:
            failed.append(str(error))
    return held, failed


def _check_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is there already: give a new or empty folder")


def _say(text: str) -> None:
    print(f"[chaos] {text}", file=sys.stderr, flush=True)
