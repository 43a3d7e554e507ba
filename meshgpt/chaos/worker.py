"""The trainer as `meshgpt chaos` runs it: it notes every row that it is fed, and its storage can be made slow.

MESHGPT_CHAOS names a folder: notes go into `fed/` in it, one file a process, and while `slow` is there, every rename
and every sync takes longer.
"""

import os
import sys
import time
import zlib
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

from meshgpt import train
from meshgpt.data.pipeline import Batches, Rows
from meshgpt.settings import json_text

VARIABLE = "MESHGPT_CHAOS"
_SLOW_SECONDS = 0.25
P = ParamSpec("P")
R = TypeVar("R")


def _slow(file: Path, call: Callable[P, R]) -> Callable[P, R]:
    def slowly(*arguments: P.args, **options: P.kwargs) -> R:
        if file.exists():
            time.sleep(_SLOW_SECONDS)
        return call(*arguments, **options)

    return slowly


def _noted(folder: Path, iterate: Callable[..., Generator[Rows, None, None]]) -> Callable[..., Generator]:
    def noting(batches: Batches, start: int, stop: int, rows: Sequence[int]) -> Generator[Rows, None, None]:
        with open(folder / f"{time.time_ns()}-{os.getpid()}.jsonl", "w", encoding="ascii") as notes:
            for step, (tokens, weights) in enumerate(iterate(batches, start, stop, rows), start=start + 1):
                fed = {int(row): zlib.crc32(tokens[i].tobytes()) for i, row in enumerate(rows)}
                notes.write(json_text({"step": step, "rows": fed}) + "\n")
                notes.flush()
                yield tokens, weights

    return noting


def main() -> int:
    """The trainer's command, with the run's arguments."""
    folder = Path(os.environ[VARIABLE])
    os.fsync = _slow(folder / "slow", os.fsync)
    os.rename = _slow(folder / "slow", os.rename)
    os.replace = _slow(folder / "slow", os.replace)
    Batches.iterate = _noted(folder / "fed", Batches.iterate)
    return train.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
