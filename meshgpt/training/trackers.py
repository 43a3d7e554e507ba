"""Where the figures of a run go: the terminal, a file of JSON lines, or several of these and those of `sinks`.

Keys of `metrics` that the trackers know (any other is written too): `tokens` (seen since step 0), `loss` and `val_loss`
(nats a token), `val_bits_per_byte`, `gzip_bits_per_byte` (what `gzip -9` needs for the same text), `grad_norm`,
`learning_rate`, `tokens_per_second`, `mfu` (model FLOPs utilisation, 0 to 1), `skipped_steps`; and of evaluations in
the loop `val/<store>/loss` and `eval/<task>/<metric>` (docs/evaluation.md).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from meshgpt.atomic import write_atomically
from meshgpt.evals.intervals import LIMITED_OF, LIMITED_TO, held_out_part, held_out_text, limited_part
from meshgpt.settings import json_text

if TYPE_CHECKING:  # rich takes a tenth of a second to import
    from rich.console import Console as RichConsole
    from rich.progress import Progress

PLAIN_SECONDS = 5.0  # between two lines of progress where the output is a file or a pipe


class Tracker(Protocol):
    """Receives a run's figures, in the order of its steps."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the figures of `step`; a second call for the same step adds to the first."""
        ...

    def message(self, text: str) -> None:
        """Takes a line for the reader."""
        ...

    def close(self) -> None:
        """Writes out what is held back and frees the terminal or the file. Nothing may be logged afterwards."""
        ...


class Several:
    """Passes everything on to each of `trackers`, in order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = tuple(trackers)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def message(self, text: str) -> None:
        for tracker in self.trackers:
            tracker.message(text)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


class Console:
    """Progress for a reader: a live line on a terminal, and a plain line every few seconds elsewhere.

    Evaluations and messages stay on the screen; figures of single steps are overwritten by the next ones.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int = 0,
        console: RichConsole | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Shows steps of `total_steps`; a resumed run passes the step it starts from as `first_step`."""
        self._total, self._clock = total_steps, clock
        self._console = console or _stdout()
        self._begun: tuple[int, float] | None = None  # the first step logged and when: the ETA leaves out compilation
        self._printed = -math.inf
        self._progress = self._task = None
        if self._console.is_terminal:
            self._progress = _live(self._console, "{task.description}")
            self._task = self._progress.add_task("first step: compiling", total=total_steps, completed=first_step)
            self._progress.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = self._clock()
        if "val_loss" in metrics:
            self._print(_evaluation(step, metrics))
        others = list(_others(metrics))
        if others:
            self._print(f"step {step:,}  {'  '.join(others)}")
        if "loss" not in metrics:
            return
        line = "  ".join(_training(metrics))
        self._begun = begun, since = self._begun or (step, now)
        if begun < step < self._total:
            line += f"  ETA {duration((now - since) / (step - begun) * (self._total - step))}"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, description=f"step {step:,}/{self._total:,}  {line}")
        elif now - self._printed >= PLAIN_SECONDS or step >= self._total:
            self._printed = now
            self._print(f"step {step:,}/{self._total:,}  {line}")

    def message(self, text: str) -> None:
        self._print(text)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


class JsonLines:
    """Appends one JSON object a logged step to a file; what cannot be a JSON number (NaN, infinity) becomes null."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Opens `path` to continue after `resume_step`, or to start afresh where that is None.

        Objects of steps after `resume_step` are dropped, since these steps are to be done again, and so is what a kill
        or a full disk left of a last line. The repaired file replaces the old one in one piece.
        """
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if resume_step is None else [row for row in read_json_lines(path) if row["step"] <= resume_step]
        text = "".join(_json_line(row) for row in kept)
        if not path.exists() or path.read_bytes() != text.encode():
            write_atomically(path, text)
        self._last: dict[str, Any] = kept[-1] if kept else {"step": -1}
        self._file = path.open("r+b")
        self._end = self._file.seek(0, os.SEEK_END)
        self._last_start = self._end - len(_json_line(self._last).encode()) if kept else self._end

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step < self._last["step"]:
            raise ValueError(f"step {step} was logged to {self._path} after step {self._last['step']}")
        if step == self._last["step"]:
            self._last |= metrics
        else:
            self._last, self._last_start = {"step": step, **metrics}, self._end
        line = _json_line(self._last).encode()
        # One write and no gap before it: whatever moment a kill picks, at most this line is torn.
        self._file.seek(self._last_start)
        self._file.write(line)
        self._file.flush()
        self._file.truncate()
        self._end = self._last_start + len(line)

    def message(self, text: str) -> None:
        """Does nothing: the file holds figures only."""

    def close(self) -> None:
        self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that `JsonLines` wrote, in order; [] where there is no file.

    Leaves out what is no object with a whole-number `step`: the end of a file cut mid-line, or the zeros that a power
    failure leaves. Where a step appears twice the later object counts.
    """
    if not path.exists():
        return []
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # covers broken JSON and broken UTF-8
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


@contextmanager
def progress_bar(
    console: RichConsole | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[str, int, int | None], None]]:
    """Yields `report(label, done, total)`, which shows how far `label` is; `total` None means not known yet.

    A terminal gets a bar a label with speed and ETA; elsewhere a plain line every few seconds and one when done.
    """
    output = console or _stdout()
    if not output.is_terminal:
        yield _PlainProgress(output, clock).report
        return
    tasks: dict[str, Any] = {}
    with _live(output, "{task.description}", bar=True) as progress:

        def report(label: str, done: int, total: int | None) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=total)
            progress.update(tasks[label], completed=done, total=total)

        yield report


class _PlainProgress:
    """`progress_bar` for a file or a pipe."""

    def __init__(self, console: RichConsole, clock: Callable[[], float]) -> None:
        self._console, self._clock = console, clock
        self._started: dict[str, float] = {}
        self._printed: dict[str, float] = {}

    def report(self, label: str, done: int, total: int | None) -> None:
        now = self._clock()
        start = self._started.setdefault(label, now)
        finished = total is not None and done >= total
        if self._printed.get(label) == math.inf or (
            now - self._printed.get(label, start) < PLAIN_SECONDS and not finished
        ):
            return
        self._printed[label] = math.inf if finished else now
        line = f"{label}  {done:,}" if total is None else f"{label}  {done:,}/{total:,} ({done / max(total, 1):.0%})"
        if finished:
            line += f"  done in {duration(now - start)}"
        elif total is not None and done > 0:
            line += f"  ETA {duration((now - start) / done * (total - done))}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """`seconds` as a reader says them: `8s`, `4m07s`, `3h05m`, `2d04h`."""
    whole = max(0, round(seconds))
    for unit, size, below, below_size in (("d", 86_400, "h", 3_600), ("h", 3_600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // below_size:02d}{below}"
    return f"{whole}s"


def amount(number: float) -> str:
    """`number` to three digits: `950`, `12.3k`, `4.56M`, `1.20B`."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size * 0.9995:
            scaled = number / size
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{suffix}"
    return f"{number:.0f}"


def _training(metrics: Mapping[str, float]) -> Iterator[str]:
    """The parts of a line about a training step."""
    yield f"loss {metrics['loss']:.4f}"
    if "tokens_per_second" in metrics:
        yield f"{amount(metrics['tokens_per_second'])} tokens/s"
    if "mfu" in metrics:
        yield f"MFU {metrics['mfu']:.1%}"
    if metrics.get("skipped_steps", 0) > 0:
        yield f"{metrics['skipped_steps']:.0f} skipped"


def _evaluation(step: int, metrics: Mapping[str, float]) -> str:
    """The line about an evaluation."""
    line = f"step {step:,}  validation loss {metrics['val_loss']:.4f}{held_out_text(metrics)}"
    if "val_bits_per_byte" in metrics:
        line += f"  {metrics['val_bits_per_byte']:.3f} bits per byte"
    if "gzip_bits_per_byte" in metrics:
        line += f" (gzip -9: {metrics['gzip_bits_per_byte']:.3f})"
    return line


def _others(metrics: Mapping[str, float]) -> Iterator[str]:
    """Figures of named stores, tasks and files, each with what marks it as a try."""
    marks = (LIMITED_TO, LIMITED_OF, "tokens", "tokens_of")
    for key, value in metrics.items():
        task, _, metric = key.rpartition("/")
        is_end = any(key.endswith(end) and key.removesuffix(end) in metrics for end in ("_low", "_high"))
        if not key.startswith(("val/", "eval/")) or metric in marks or is_end:
            continue
        low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
        part = held_out_part(metrics, f"{task}/") if key.startswith("val/") else limited_part(metrics, task)
        if part is None or not part.limited:
            yield f"{key} {value:.4g}"
        elif low is None or high is None:
            yield f"{key} {value:.4g} (a try: {part})"
        else:
            yield f"{key} {value:.4g} (a try: {part}; 95%: {low:.4g} to {high:.4g})"


def _json_line(row: Mapping[str, Any]) -> str:
    return json_text(row) + "\n"


def _stdout() -> RichConsole:
    from rich.console import Console as RichConsole

    return RichConsole()


def _live(console: RichConsole, text: str, bar: bool = False) -> Progress:
    """A live display: `text`, and with `bar` how far, how fast and how long still."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

    tail = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn()) if bar else (BarColumn(bar_width=20),)
    return Progress(SpinnerColumn(), TextColumn(text, markup=False), *tail, console=console)
