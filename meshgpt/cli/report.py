"""The verb `meshgpt report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import tyro

from meshgpt import flags
from meshgpt.errors import UserError
from meshgpt.report.card import CardOptions
from meshgpt.report.serve import Server
from meshgpt.report.write import read_runs, write_report
from meshgpt.settings import settings


@settings()
class Arguments:
    """A run's model card, plots and page; of several runs, their comparison. The runs may be in progress."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of the runs to report on."""
    out: Path | None = None
    """Folder to write; None takes `report` in the run's folder, or `comparison` beside the first of several."""
    card: Annotated[CardOptions, tyro.conf.arg(name="")] = CardOptions()
    """What a run's folder cannot know."""
    serve: bool = False
    """Show the page on this machine and refresh it while the runs train, instead of writing files."""
    port: int = 8420
    """Port that --serve listens on; 0 takes a free one."""


def report(arguments: Sequence[str]) -> None:
    """meshgpt report RUN... [--serve]"""
    asked = flags.parse(Arguments, arguments, "meshgpt report")
    if not asked.runs:
        raise UserError("which run? give the folder of one, or of several to compare: meshgpt report runs/quickstart")
    jax.config.update("jax_platforms", "cpu")  # an accelerator here belongs to the run that is being looked at
    if asked.serve:
        _serve(asked)
        return
    single = len(asked.runs) == 1
    out = asked.out or (asked.runs[0] / "report" if single else asked.runs[0].resolve().parent / "comparison")
    facts = read_runs(asked.runs)
    files = write_report(facts, out, asked.card)
    for run in facts:
        for note in run.notes:
            print(f"{run.name}: {note}")
    what = "the model card; what is marked (to fill in) is yours" if single else "the comparison"
    print(f"{files[0]}  {what}")
    print(f"{files[1]}  opens in any browser, offline")
    print(f"{files[2].parent if len(files) > 2 else out}  {len(files) - 2} plots")


def _serve(asked: Arguments) -> None:
    if not 0 <= asked.port < 65536:
        raise UserError(f"--port {asked.port}: give a number from 0 to 65535")
    with Server(asked.runs, asked.card, asked.port) as server:
        print(f"{server.address}  (this machine only; Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
