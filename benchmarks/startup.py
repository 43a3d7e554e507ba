"""Seconds until something happens: `meshgpt --help`, and a run's first step, cold and with the compilation cache.

    python benchmarks/startup.py [RECIPE] [--repeat 3] [--json FILE]

The run's text is prepared first, so that what is measured is imports, tracing, compiling (or the cache), and the first
step. Each start is a process of its own, from nothing to the line of its first step.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record

ROOT = Path(__file__).parent.parent


def seconds_until(command: list[str], line: str, environment: dict[str, str]) -> float:
    """Until a process prints a line that begins so, after which it is ended; with "", until it ends by itself."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert process.stdout is not None
    for text in process.stdout:
        if line and text.startswith(line):
            elapsed = time.perf_counter() - begun
            process.kill()
            process.wait()
            return elapsed
    if process.wait() or line:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode} before it came to {line!r}")
    return time.perf_counter() - begun


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("recipe", nargs="?", default=str(ROOT / "configs" / "quickstart.py"))
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    begun = record.begin("startup", args)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as room:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        helps = [sys.executable, "-m", "meshgpt.cli", "--help"]
        seconds["help"] = [seconds_until(helps, "", environment) for _ in range(args.repeat + 1)][1:]
        report("meshgpt --help", seconds["help"])
        train = [sys.executable, "-m", "meshgpt.train", args.recipe, "--data.prepare.out", f"{room}/data"]
        train += ["--log-every", "1", "--resume", "never"]
        prepared = [*train, "--run-dir", f"{room}/first"]
        seconds_until(prepared, "step 1/", environment | {"XDG_CACHE_HOME": f"{room}/warm"})
        cold, warm = [], []
        for number in range(args.repeat):
            command = [*train, "--run-dir", f"{room}/run-{number}"]
            cold.append(seconds_until(command, "step 1/", environment | {"XDG_CACHE_HOME": f"{room}/cold-{number}"}))
            command = [*train, "--run-dir", f"{room}/again-{number}"]
            warm.append(seconds_until(command, "step 1/", environment | {"XDG_CACHE_HOME": f"{room}/warm"}))
        report("first step, nothing compiled before", cold)
        report("first step, with the compilation cache", warm)
    begun.write(seconds | {"cold": cold, "warm": warm}, {})


def report(what: str, seconds: list[float]) -> None:
    every = " ".join(f"{one:.2f}" for one in seconds)
    print(f"{what:<40} {statistics.median(seconds):6.2f} s  ({every})", flush=True)


if __name__ == "__main__":
    main()
