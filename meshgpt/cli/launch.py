"""`meshgpt launch --processes N RECIPE [flags]`: N supervised processes of one run on this machine."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from meshgpt import recipe
from meshgpt.config import Run
from meshgpt.distributed.heartbeat import Silence
from meshgpt.distributed.supervisor import Layout, Patience, Supervisor
from meshgpt.errors import UserError
from meshgpt.models.model import check_divisibility

USAGE = """usage: meshgpt launch [--processes N] [--elastic] [--max-restarts K] ... RECIPE [flags of the recipe]

Trains with N processes on this machine and keeps them going: one that dies or hangs brings all down, and up again from
the newest intact checkpoint. Ctrl-C or SIGTERM saves on all of them at the same step; a second one kills.

  --processes N      how many (1)
  --devices D        virtual CPU devices of each process (JAX_NUM_CPU_DEVICES, or 1). Several processes are on the CPU
                     unless JAX_PLATFORMS says otherwise; of a GPU machine, one drives all GPUs
  --port P           of the coordinator, on the loopback interface (a free one)
  --elastic          after a death go on with as many processes as remain and the mesh allows
  --max-restarts K   in a row without a checkpoint gained, before giving up (5)
  --hang-seconds S   no sign of life for so long, and for 20 usual steps: the process hangs (30)
  --start-seconds S  the same before the second step, which has data, checkpoint and compilation before it (3600)
  --busy-seconds S   the same in a save, an evaluation, or at the end of the run (1800)
  --grace-seconds S  after Ctrl-C or SIGTERM, and after the last sign of a save that makes progress (120)
  --deadline-seconds S
                     within which all must have come to the coordinator (MESHGPT_DEADLINE, or 300)"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\n{USAGE}")


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags before the recipe, and the rest: the recipe and its flags."""
    parser = _Parser(prog="meshgpt launch", add_help=False, allow_abbrev=False)
    for name, default in (("processes", 1), ("devices", 0), ("port", 0), ("max-restarts", Patience.max_restarts)):
        parser.add_argument(f"--{name}", type=int, default=default)
    times = {
        "hang": Silence.seconds, "start": Silence.start, "busy": Silence.busy, "grace": Patience.grace,
        "deadline": Patience.deadline,
    }  # fmt: skip
    for name, seconds in times.items():
        parser.add_argument(f"--{name}-seconds", type=float, default=seconds)
    parser.add_argument("--elastic", action="store_true")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    asked = parser.parse_args(list(arguments))
    if asked.processes < 1:
        raise UserError(f"--processes {asked.processes}: give at least 1")
    for name in ("devices", "max_restarts", *(f"{name}_seconds" for name in times)):
        if not getattr(asked, name) >= 0:  # a NaN neither
            raise UserError(f"--{name.replace('_', '-')} {getattr(asked, name)}: give a number of 0 or more")
    if not 0 <= asked.port < 2**16:
        raise UserError(f"--port {asked.port}: give a port from 1 to 65535, or 0 for a free one")
    return asked, asked.rest


def patience(asked: argparse.Namespace) -> Patience:
    silence = Silence(seconds=asked.hang_seconds, start=asked.start_seconds, busy=asked.busy_seconds)
    return Patience(
        max_restarts=asked.max_restarts, silence=silence, grace=asked.grace_seconds, deadline=asked.deadline_seconds
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
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    asked, rest = parse(arguments)
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
        patience(asked),
        lambda text: print(f"[launch] {text}", file=sys.stderr, flush=True),
        fewer=fewer(run, devices) if asked.elastic else None,
    ).run()
