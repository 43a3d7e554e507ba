"""Trials trained: here one after the other, or one on each of several hosts by a command template."""

import math
import queue
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from meshgpt.errors import UserError
from meshgpt.report.yardstick import other_text, other_tokens, read_yardstick
from meshgpt.sweep.trials import CRASHED, Sweep, Trial
from meshgpt.training.run_folder import RunFolder
from meshgpt.training.trackers import duration, read_json_lines

_MISTAKE = 2  # the exit code of a user's mistake
_INTERRUPTED = (-1, -2, -15, 129, 130, 143)
_LOST = 255  # ssh: the connection, and not the command, failed


def run_all(
    sweep: Sweep, trials: Sequence[Trial], template: str, hosts: Sequence[str], report: Callable[[str], None]
) -> None:
    """Trains what is not done of `trials`, and keeps each score as it comes.

    Raises:
      UserError: a trial that `meshgpt train` refuses: so it would all of them, or the axis is at fault; one whose
        metrics lack what decides; or no host is left.
    """
    crew = _Crew(sweep, trials, template, report)
    if crew.total < len(trials):
        report(f"{len(trials) - crew.total} of {len(trials)} trials are done already")
    workers = [threading.Thread(target=crew.work, args=(host,), daemon=True) for host in hosts or [""]]
    for worker in workers:
        worker.start()
    try:
        while any(worker.is_alive() for worker in workers):  # a little at a time, so that Ctrl-C is heard
            time.sleep(0.1)
    except KeyboardInterrupt:
        crew.interrupt()  # what is under way saves
        for worker in workers:
            worker.join()
        raise
    if crew.stops:
        raise crew.stops[0]
    if not crew.left.empty():
        raise UserError(f"{crew.left.qsize()} trials are left and no host for them; the same command goes on from here")


class _Crew:
    """What the hosts share while they train: the trials that are left, and why to stop."""

    def __init__(self, sweep: Sweep, trials: Sequence[Trial], template: str, report: Callable[[str], None]) -> None:
        self._sweep, self._template, self._report = sweep, template, report
        self.left: queue.Queue[Trial] = queue.Queue()
        for trial in trials:
            if not trial.done:
                self.left.put(trial)
        self.total, self._ended, self._begun = self.left.qsize(), 0, time.monotonic()
        self.stops: list[Exception] = []
        self._lock, self._running = threading.Lock(), set[subprocess.Popen[bytes]]()

    def interrupt(self) -> None:
        """Begins no other trial, and asks those under way to stop."""
        self.stops.append(UserError("interrupted"))
        for process in tuple(self._running):
            process.terminate()

    def work(self, host: str) -> None:
        """Trains one after the other, until none is left or one gives a reason to stop."""
        try:
            while not self.stops and self._one(host):
                pass
        except Exception as error:  # raised by `run_all`: a thread that just ends would look as if all were done
            self.stops.append(error)

    def _one(self, host: str) -> bool:
        """Whether this host is to go on."""
        try:
            trial = self.left.get_nowait()
        except queue.Empty:
            return False
        code, words = _train(self._sweep, trial, self._template, host, self._running)
        with self._lock:
            if self._template and code == _LOST:
                self.left.put(trial)
                self._report(f"{host} is lost ({words}); its trial is left to the others")
                return False
            if stop := _settle(self._sweep, trial, code, words):
                raise UserError(stop)
            self._ended += 1
            to_go = (time.monotonic() - self._begun) / self._ended * (self.total - self._ended)
            outcome = trial.failed if trial.score is None else f"{self._sweep.plan.metric} {trial.score:.4f}"
            self._report(f"{self._ended} of {self.total}, {duration(to_go)} to go: {trial}: {outcome}")
        return True


def _settle(sweep: Sweep, trial: Trial, code: int, words: str) -> str:
    """Keeps a trial's score; gives why the sweep must stop, or ""."""
    folder = RunFolder(sweep.run_dir(trial))
    if code in _INTERRUPTED or (code == 0 and folder.finished_step() is None):
        return f"{trial.name} was interrupted; the same command goes on from here"
    diverged = folder.diverged_step() if code == _MISTAKE else None
    if code == _MISTAKE and diverged is None:
        return f"{trial.name} ({trial}) is refused: {words} ({_log(sweep, trial)} has all of it)"
    value = score(sweep.run_dir(trial), sweep.plan.metric) if code == 0 else None
    if value is not None and (why := incomparable(sweep, trial)):
        return why
    if diverged is not None:
        trial.failed = f"diverged by step {diverged:,}"
    elif code:
        trial.failed = f"{CRASHED}{code}: {words}"
    elif value is None:
        names = sorted({name for row in read_json_lines(folder.metrics) for name in row} - {"step"})
        return f"{trial.name} has no {sweep.plan.metric}: give as --metric one of {', '.join(names)}"
    elif not math.isfinite(value):
        trial.failed = f"{sweep.plan.metric} is {value}"
    else:
        trial.score = value
    sweep.save()
    return ""


def incomparable(sweep: Sweep, trial: Trial) -> str:
    """Why the metric that decides does not compare a trial with those before it, or ""."""
    metric, before = sweep.plan.metric, next((one for one in sweep.trials if one.score is not None), None)
    per_byte, measured = "bits_per_byte" in metric, metric == "loss" or metric.startswith(("val_", "val/"))
    per_token = (measured or metric.endswith("token_perplexity")) and not per_byte
    if before is None or not (measured or per_token):
        return ""
    pair = []
    for one in (before, trial):
        folder = RunFolder(sweep.run_dir(one))
        pair.append((one.name, read_yardstick(folder, read_json_lines(folder.metrics))))
    if measured and metric != "loss" and (said := other_text(pair)):
        return f"{said}, and {metric} does not compare them: sweep over one text"
    if per_token and (said := other_tokens(pair)):
        return (
            f"{said}, and {metric} is of tokens, so that it does not compare them: give --metric val_bits_per_byte "
            "(and another --out)"
        )
    return ""


def command_of(sweep: Sweep, trial: Trial, python: str = sys.executable) -> list[str]:
    """The line that trains a trial; given again it goes on."""
    own = [*sweep.plan.fixed, *trial.flags, "--run-dir", str(sweep.run_dir(trial))]
    return [python, "-m", "meshgpt.train", sweep.plan.recipe, *own]


def filled(template: str, host: str, command: Sequence[str]) -> str:
    """The template's line for bash; between quotation marks the command is written so that they do not end in it."""
    line, (done, *parts) = shlex.join(command), template.replace("{host}", host).split("{command}")
    written = {"": line, "'": line.replace("'", "'\\''"), '"': re.sub(r'([\\"$`])', r"\\\1", line)}
    for part in parts:
        done += written[_open_quote(done)] + part
    return done


def _open_quote(text: str) -> str:
    """The quotation mark that is open at the end of a line for bash, or ""."""
    quote, escaped = "", False
    for letter in text:
        if escaped:
            escaped = False
        elif letter == "\\" and quote != "'":
            escaped = True
        elif quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
    return quote


def _log(sweep: Sweep, trial: Trial) -> Path:
    return sweep.folder / f"{trial.name}.log"


def _train(
    sweep: Sweep, trial: Trial, template: str, host: str, running: set[subprocess.Popen[bytes]]
) -> tuple[int, str]:
    """(exit code, the last line in words of its output), which is kept in `<trial>.log`."""
    command = command_of(sweep, trial)
    if template:
        command = ["bash", "-c", filled(template, host, command)]
    sweep.folder.mkdir(parents=True, exist_ok=True)
    log = _log(sweep, trial)
    # No input: ssh would take what is typed in the terminal.
    with (
        open(log, "ab") as output,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as process,
    ):
        running.add(process)
        code = process.wait()
        running.discard(process)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return code, next((line.strip() for line in reversed(lines) if re.search(r"\w", line)), "")


def score(run_dir: Path, metric: str) -> float | None:
    """The last value of a metric, NaN where that was no finite number; None where the run has none."""
    values = [row[metric] for row in read_json_lines(RunFolder(run_dir).metrics) if metric in row]
    if not values:
        return None
    return math.nan if values[-1] is None else float(values[-1])  # JSON has no NaN and no infinity
