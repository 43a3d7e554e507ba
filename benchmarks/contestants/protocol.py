"""How a contestant of `compare.py` talks: a process that builds a training step, and then does one whenever it is told.

It gets a folder with spec.json (rows, length, dtype, learning_rate and so on), tokens.npy (rows, length + 1) and
a Hugging Face model; it prints a line of JSON when it is ready, one a step, and one at the end.
"""

import importlib.metadata
import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

WARMUP = 3


def serve(
    step: Callable[[], float], begun: float, versions: dict[str, str], peak: Callable[[], int] | None = None
) -> None:
    """Does the first steps, says their losses, and then one more for each line that comes in."""
    losses = [step()]
    compiled = time.perf_counter() - begun
    losses += [step() for _ in range(WARMUP - 1)]
    say({"losses": losses, "seconds_to_first_step": compiled, "versions": versions})
    for line in sys.stdin:
        if line.strip() == "end":
            break
        start = time.perf_counter()
        step()
        say({"seconds": time.perf_counter() - start})
    of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    say({"peak_bytes": peak() if peak else of_process})


def versions_of(*packages: str) -> dict[str, str]:
    """Of this Python, which need not be that of the others, and of packages."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def say(what: dict) -> None:
    print(json.dumps(what), flush=True)


def spec(folder: Path) -> dict:
    return json.loads((folder / "spec.json").read_text())
