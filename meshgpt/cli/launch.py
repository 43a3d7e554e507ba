"""`meshgpt launch --processes N RECIPE [flags]`: N supervised processes of one run on this machine."""

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from meshgpt import recipe
from meshgpt.config import Run
from meshgpt.distributed.heartbeat import HangTimeouts
from meshgpt.distributed.supervisor import Layout, Patience, Supervisor
from meshgpt.errors import UserError
from meshgpt.flags import OTHER_NAMES
from meshgpt.models.model import check_divisibility
from meshgpt.settings import settings


@settings()
class Arguments:
    """Trains with several processes on this machine and keeps them going.

    One that dies or hangs brings all down, and up again from the newest intact checkpoint. Ctrl-C or SIGTERM saves on
    all of them at the same step; a second one kills. Several processes are on the CPU unless JAX_PLATFORMS says
    otherwise; of a GPU machine, one drives all GPUs. `meshgpt launch RECIPE --help` lists the flags of the recipe.
    """

    processes: int = 1
    """Number of processes."""
    devices: int = 0
    """Number of virtual CPU devices of each process; 0 takes JAX_NUM_CPU_DEVICES, or 1."""
    port: int = 0
    """Port of the coordinator, on the loopback interface; 0 takes a free one."""
    elastic: bool = False
    """Go on after a death with as many processes as remain and the mesh allows."""
    max_restarts: int = Patience.max_restarts
    """Number of restarts in a row, without a checkpoint gained, after which to give up."""
    hang_seconds: float = HangTimeouts.seconds
    """Seconds without a sign of life, and at least 20 usual steps, after which a process counts as hung."""
    start_seconds: float = HangTimeouts.start
    """The same in seconds before the second step, which has data, checkpoint and compilation before it."""
    busy_seconds: float = HangTimeouts.busy
    """The same in seconds during a save, an evaluation, or at the end of the run."""
    grace_seconds: float = Patience.grace
    """Seconds for saving after Ctrl-C or SIGTERM, counted from the last sign of a save that makes progress."""
    deadline: float = dataclasses.field(default=Patience.deadline, metadata={OTHER_NAMES: ("deadline_seconds",)})
    """Seconds within which all processes must have come to the coordinator; 0 takes MESHGPT_DEADLINE, or 300."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise UserError(f"--processes {self.processes}: give at least 1")
        times = ("hang_seconds", "start_seconds", "busy_seconds", "grace_seconds", "deadline")
        for name in ("devices", "max_restarts", *times):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: give a number of 0 or more")
        if not 0 <= self.port < 2**16:
            raise UserError(f"--port {self.port}: give a port from 1 to 65535, or 0 for a free one")

    @property
    def patience(self) -> Patience:
        timeouts = HangTimeouts(seconds=self.hang_seconds, start=self.start_seconds, busy=self.busy_seconds)
        return Patience(
            max_restarts=self.max_restarts, timeouts=timeouts, grace=self.grace_seconds, deadline=self.deadline
        )


def fits(run: Run, devices: int) -> bool:
    """Whether a run can go on with so many devices: its mesh, and its batch over it."""
    try:
        check_divisibility(run.model, run.mesh.resolve(devices), run.global_batch, run.accumulate)
    except UserError:
        return False
    return True


def shrinkable(run: Run) -> Run:
    """The run with a data axis that takes what devices there are, where no axis of its mesh does."""
    mesh = run.mesh
    fixed = -1 not in (mesh.data, mesh.fsdp, mesh.tensor)
    return dataclasses.replace(run, mesh=dataclasses.replace(mesh, data=-1)) if fixed else run


def fewer(run: Run, devices: int) -> Callable[[int], int]:
    """Of so many processes with `devices` each: how many to go on with when one has died."""
    return lambda now: next((n for n in range(now - 1, 0, -1) if fits(shrinkable(run), n * devices)), now)


def command(
    rest: Sequence[str], run: Run, asked: int, module: str = "meshgpt.train"
) -> Callable[[int, bool], list[str]]:
    """What each process runs, for a number of processes, `asked` at first, and whether the run has begun."""
    mesh = ["--mesh.data=-1"] if shrinkable(run) is not run else []
    # A restart goes on; were it to set the run aside again, nothing would ever be gained.
    resume = ["--resume", "auto"] if run.resume == "never" else []

    def build(processes: int, begun: bool) -> list[str]:
        changed = (mesh if processes != asked else []) + (resume if begun else [])
        return [sys.executable, "-m", module, *rest, *changed]

    return build


def launch(arguments: Sequence[str]) -> int:
    """meshgpt launch RECIPE; gives the exit code."""
    asked, rest = recipe.take(Arguments, arguments, "meshgpt launch")
    run = recipe.parse(rest, "meshgpt launch")  # a mistake is told once, and not by every process
    devices = asked.devices or (int(os.environ.get("JAX_NUM_CPU_DEVICES", "1")) if asked.processes > 1 else 0)
    if devices:
        mesh = run.mesh.resolve(asked.processes * devices)
        check_divisibility(run.model, mesh, run.global_batch, run.accumulate)
    layout = Layout(processes=asked.processes, devices=devices, port=asked.port)
    return Supervisor(
        command(rest, run, asked.processes),
        layout,
        Path(run.run_dir),
        asked.patience,
        lambda text: print(f"[launch] {text}", file=sys.stderr, flush=True),
        fewer=fewer(run, devices) if asked.elastic else None,
    ).run()
