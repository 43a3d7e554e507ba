"""The trainer with something slow in it: `python -m tests.disturbed DISTURBANCES [arguments of meshgpt.train]`.

DISTURBANCES (JSON):
  folder: `KIND-PROCESS` appears in it when a disturbance begins; `digested-PROCESS` has the files that it read for
    their digests.
  digesting: [process, seconds]: that process takes so long for one file of a checkpoint.
  preparing: [process, seconds]: ... to open its data.
  compiling: that process never comes back from compiling, and no Python runs in its main thread.
  exporting: that process takes for ever.
  shutdown: seconds after which JAX's wait at the end of a process gives up, 300 otherwise.
"""

import ctypes
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from meshgpt import train
from meshgpt.checkpoint import manifest
from meshgpt.training import loop


def stuck() -> None:
    """Waits for ever in C, where no signal reaches Python: for a mutex that this thread holds."""
    mutex = ctypes.create_string_buffer(64)  # zeros are an unlocked one
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)


def main() -> int:
    asked: dict[str, Any] = json.loads(sys.argv[1])
    own, folder = int(os.environ.get("MESHGPT_PROCESS_ID", "0")), Path(asked["folder"])

    def begun(kind: str) -> None:
        (folder / f"{kind}-{own}").touch()

    def after(kind: str, wait: Callable[[], None], call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def disturbed(*arguments: Any, **options: Any) -> Any:
            begun(kind)
            wait()
            return call(*arguments, **options)

        return disturbed

    def noting(path: Path, *arguments: Any, **options: Any) -> str:
        with open(folder / f"digested-{own}", "a") as file:
            file.write(f"{path}\n")
        return digest(path, *arguments, **options)

    digest = manifest._digest
    process, seconds = asked.get("digesting", (-1, 0))
    first = iter([seconds])
    slow = after("digesting", lambda: time.sleep(next(first, 0)), noting)
    manifest._digest = slow if own == process else noting
    process, seconds = asked.get("preparing", (-1, 0))
    if own == process:
        loop.open_run_data = after("preparing", lambda: time.sleep(seconds), loop.open_run_data)
    if own == asked.get("compiling"):
        loop.compile_fitting = after("compiling", stuck, loop.compile_fitting)
    if own == asked.get("exporting"):
        loop.finish = after("exporting", lambda: time.sleep(1e6), loop.finish)
    if "shutdown" in asked:
        options = {"shutdown_timeout_seconds": asked["shutdown"]}
        jax.distributed.initialize = functools.partial(jax.distributed.initialize, **options)
    return train.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
