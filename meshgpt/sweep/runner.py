"""Trials trained: here one after the other, or one on each of several hosts by a command template."""

import math
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from meshgpt.errors import UserError
from meshgpt.run_folder import RunFolder
from meshgpt.sweep.trials import Sweep, Trial
from meshgpt.tracker import duration, read_json_lines

_MISTAKE = 2  # the exit code of a user's mistake
_INTERRUPTED = (-2, -15, 130, 143)


def run_all(
    sweep: Sweep, trials: Sequence[Trial], template: str, hosts: Sequence[str], report: Callable[[str], None]
) -> None:
    """Trains what is not done of `trials`, and keeps each score as it comes.

    Raises:
      UserError: a trial that `meshgpt train` refuses: so it would all of them, or the axis is at fault.
    """
    left: queue.Queue[Trial] = queue.Queue()
    for trial in trials:
        if not trial.done:
            left.put(trial)
    total, begun = left.qsize(), time.monotonic()
    if total < len(trials):
        report(f"{len(trials) - total} of {len(trials)} trials are done already")
    lock, stops, ended = threading.Lock(), list[str](), list[Trial]()

    def work(host: str) -> None:
        while not stops:
            try:
                trial = left.get_nowait()
            except queue.Empty:
                return
            code, words = _train(sweep, trial, template, host)
            with lock:
                if stop := _settle(sweep, trial, code, words):
                    stops.append(stop)
                    return
                ended.append(trial)
                to_go = (time.monotonic() - begun) / len(ended) * (total - len(ended))
                outcome = trial.failed if trial.score is None else f"{sweep.plan.metric} {trial.score:.4f}"
                report(f"{len(ended)} of {total}, {duration(to_go)} to go: {trial}: {outcome}")

    workers = [threading.Thread(target=work, args=(host,), daemon=True) for host in hosts or [""]]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):  # waited for a little at a time, so that Ctrl-C is heard
        time.sleep(0.1)
    if stops:
        raise UserError(stops[0])


def _settle(sweep: Sweep, trial: Trial, code: int, words: str) -> str:
    """Keeps a trial's score; gives why the sweep must stop, or ""."""
    finished = RunFolder(sweep.run_dir(trial)).finished_step() is not None
    if code in _INTERRUPTED or (code == 0 and not finished):
        return f"{trial.name} was interrupted; the same command goes on from here"
    if code == _MISTAKE:
        return f"{trial.name} ({trial}) is refused: {words}"
    value = score(sweep.run_dir(trial), sweep.plan.metric) if code == 0 else None
    if code:
        trial.failed = f"exit code {code}: {words}"
    elif value is None:
        trial.failed = f"its metrics have no {sweep.plan.metric}"
    elif not math.isfinite(value):
        trial.failed = f"{sweep.plan.metric} is {value}"
    else:
        trial.score = value
    sweep.save()
    return ""


def command_of(sweep: Sweep, trial: Trial, python: str = sys.executable) -> list[str]:
    """The line that trains a trial; given again it goes on."""
    own = [*sweep.plan.fixed, *trial.flags, "--run-dir", str(sweep.run_dir(trial))]
    return [python, "-m", "meshgpt.train", sweep.plan.recipe, *own]


def _train(sweep: Sweep, trial: Trial, template: str, host: str) -> tuple[int, str]:
    """(exit code, the last line of its output), which is kept in `<trial>.log`."""
    command = command_of(sweep, trial)
    if template:
        command = ["bash", "-c", template.replace("{host}", host).replace("{command}", shlex.join(command))]
    sweep.folder.mkdir(parents=True, exist_ok=True)
    log = sweep.folder / f"{trial.name}.log"
    with open(log, "ab") as output:
        code = subprocess.run(command, stdout=output, stderr=output, check=False).returncode
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return code, lines[-1] if lines else ""


def score(run_dir: Path, metric: str) -> float | None:
    """The last value of a metric; None where the run has none."""
    values = [row[metric] for row in read_json_lines(RunFolder(run_dir).metrics) if row.get(metric) is not None]
    return float(values[-1]) if values else None
