"""What a run's folder says about the run, read once for everything that is drawn or written of it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from meshgpt.config import Run
from meshgpt.data.batch_sizes import BatchSizes
from meshgpt.data.mixture import Schedule
from meshgpt.data.records import Packed, Sequences
from meshgpt.data.store import Store
from meshgpt.errors import UserError
from meshgpt.evals.intervals import Part, held_out_part
from meshgpt.models import flops as scaling
from meshgpt.models.model import parameter_shapes
from meshgpt.report.evals import Result, read_evals
from meshgpt.report.yardstick import Yardstick, read_yardstick
from meshgpt.training.program import flops_per_token
from meshgpt.training.run_folder import RunFolder
from meshgpt.training.sessions import read_sessions
from meshgpt.training.trackers import read_json_lines

_MOST_SOURCES = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Part of the training text: a file, a folder of files, or a source of a mixture.

    seen: tokens of it that the run has seen, repetitions included; None where that follows from `tokens`.
    """

    name: str
    tokens: int
    documents: int
    bytes: int
    seen: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """A run as its folder has it.

    rows: of metrics.jsonl. sessions: of sessions.json. restarts: how often `meshgpt launch` started it again.
    sources: of the token store, [] where it is gone. notes: what could not be read, in sentences.
    flops_per_token: of training.
    """

    folder: Path
    name: str
    run: Run
    record: dict[str, Any]
    rows: list[dict[str, Any]]
    sessions: list[dict[str, Any]]
    restarts: int
    results: list[Result]
    sources: list[Source]
    notes: list[str]
    parameters: scaling.Parameters
    flops_per_token: int

    @functools.cached_property
    def yardstick(self) -> Yardstick:
        """What its losses are measured by."""
        return read_yardstick(RunFolder(self.folder), self.rows)

    @property
    def started(self) -> str:
        """When the run's first session began (UTC, ISO 8601); "" where nothing recorded it."""
        return _started(self.record, self.sessions)

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def tokens(self) -> int:
        return self.tokens_by(self.step)

    def tokens_by(self, step: int) -> int:
        """Tokens of the first `step` steps."""
        return self.sizes.before(step) * self.run.sequence_length

    @property
    def sizes(self) -> BatchSizes:
        """Sequences of each step, which a resumed run may have changed."""
        return BatchSizes.from_json(self.record.get("batch_sizes") or [[0, self.run.global_batch]])

    @property
    def finished(self) -> bool:
        return self.step >= self.run.last_step

    @property
    def flops(self) -> float:
        """Of the tokens that the model has seen; what a restart did again is not in it."""
        return float(self.tokens) * self.flops_per_token

    @property
    def hours(self) -> float | None:
        """Wall-clock hours of all sessions, restarts and evaluations included; None where nothing recorded them."""
        return sum(session["seconds"] for session in self.sessions) / 3600 if self.sessions else None

    @property
    def device_hours(self) -> dict[str, float]:
        """Hours times devices, by kind of device."""
        hours: Counter[str] = Counter()
        for session in self.sessions:
            hours[session["device_kind"]] += session["seconds"] / 3600 * session["devices"]
        return dict(hours)

    @property
    def hardware(self) -> str:
        """`8 x TPU v4`, or several of these where the run moved; empty where nothing recorded it."""
        each = dict.fromkeys(f"{session['devices']} x {session['device_kind']}" for session in self.sessions)
        return ", then ".join(each)

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of the rows that have `key`; a value that is no finite number is NaN."""
        rows = [row for row in self.rows if key in row]
        steps = np.array([row["step"] for row in rows], dtype=float)
        return steps, np.array([number(row[key]) for row in rows], dtype=float)

    def last(self, key: str) -> float | None:
        """The last finite value of a key."""
        row = self.last_row(key)
        return number(row[key]) if row else None

    def measured_part(self, prefix: str = "val_") -> Part | None:
        """Tokens of the held-out text, or (`val/<store>/`) of a named store, that its last figure was measured on.

        None where it was all of them. Metrics of before this was kept say nothing of a run with `eval_batches`: then
        how many there are counts as not known.
        """
        row = self.last_row(f"{prefix}loss")
        part = held_out_part(row, prefix)
        if part is None and row and self.run.eval_batches:
            used = self.run.eval_batches * self.run.global_batch * self.run.sequence_length
            part = Part(used=used, of=None, unit="tokens")
        return part if part is not None and part.limited else None

    def last_row(self, key: str) -> dict[str, Any]:
        """The last line of the metrics with a finite value of `key`; {} where there is none."""
        return next((row for row in reversed(self.rows) if math.isfinite(number(row.get(key)))), {})


def number(value: Any) -> float:
    """`value` as a float, NaN where it is none or not finite."""
    return float(value) if type(value) in (int, float) and math.isfinite(value) else math.nan


def read_facts(path: Path) -> Facts:
    """Reads the run in folder `path`, finished or in progress.

    Raises:
      UserError: no run there, or one that this version cannot read.
    """
    folder = RunFolder(path)
    run = folder.read_run()
    rows = read_json_lines(folder.metrics)
    results, unread = read_evals(folder.evals, rows, run.evals.limit)
    sources, missing = _sources(run, folder, rows[-1]["step"] if rows else 0)
    notes = [f"{name} in evals/ is not a file of results, and was left out" for name in unread]
    notes += missing + _torn(folder.metrics)
    notes += [] if rows else ["nothing was logged yet"]
    record = json.loads(folder.record.read_text(encoding="utf-8"))
    sessions = read_sessions(folder.sessions)
    return Facts(
        folder=path,
        name=path.resolve().name or "run",
        run=run,
        record=record,
        rows=rows,
        sessions=sessions,
        restarts=_restarts(folder.restarts, _started(record, sessions)),
        results=results,
        sources=sources,
        notes=notes,
        parameters=scaling.count_parameters(parameter_shapes(run.model), run.model.vocab_size),
        flops_per_token=flops_per_token(run),
    )


def _started(record: dict[str, Any], sessions: list[dict[str, Any]]) -> str:
    """The earliest of the times that run.json (which once had the last session's) and the sessions have."""
    times = [record.get("started"), *(session.get("started") for session in sessions)]
    return min((time for time in times if isinstance(time, str) and time), default="")


def _restarts(path: Path, since: str) -> int:
    """Restarts since a time (UTC, ISO 8601), as the supervisor wrote them; those of a run set aside stay there."""
    if not path.exists():
        return 0
    times = [entry["time"] for line in path.read_bytes().splitlines() if (entry := _object(line)) and "time" in entry]
    return sum(type(time) is str and time >= since for time in times)


def _torn(metrics: Path) -> list[str]:
    """A sentence about lines that could not be read, if there are any."""
    if not metrics.exists():
        return []
    lines = metrics.read_bytes().splitlines()
    bad = [index for index, line in enumerate(lines, start=1) if not _is_row(line)]
    if not bad:
        return []
    if bad == [len(lines)]:
        return [f"{metrics.name} is cut off within its last line ({len(lines)}), and was read up to there"]
    return [f"{len(bad)} lines of {metrics.name} could not be read (the first is line {bad[0]}), and were left out"]


def _is_row(line: bytes) -> bool:
    return type(_object(line).get("step")) is int


def _object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; {} where it has none."""
    try:
        value = json.loads(line)
    except ValueError:  # covers broken JSON and broken UTF-8
        return {}
    return value if isinstance(value, dict) else {}


def _sources(run: Run, folder: RunFolder, step: int) -> tuple[list[Source], list[str]]:
    """The training text by source, largest first; and a sentence where it cannot be read any more."""
    made = run.data.prepare.out if run.data.prepare else ""
    try:
        if run.data.mixture:
            return _mixed(run, folder.batch_sizes(), step), []
        return _files(Path(run.data.store or made or folder.data)), []
    except (UserError, OSError, ValueError, KeyError) as error:
        return [], [f"the training text cannot be described, since its token store cannot be read: {error}"]


def _mixed(run: Run, sizes: BatchSizes, step: int) -> list[Source]:
    """The sources of a mixture and what of each the run has seen by `step`."""
    places = {source.label: source.store for stage in run.data.mixture for source in stage.sources}
    stores = [Store.open(place) for place in places.values()]
    splits, length = [store.split("train") for store in stores], run.sequence_length
    packed = run.data.packing == "best_fit"
    records = [
        Packed(store, split, length) if packed else Sequences(split, length)
        for store, split in zip(stores, splits, strict=True)
    ]
    tokens, lengths = [split.num_tokens for split in splits], [len(one) for one in records]
    schedule = Schedule(run.data.mixture, tuple(places), tokens, lengths, sizes)
    used = schedule.used(sizes.before(step))
    return [
        Source(
            name=name,
            tokens=split.num_tokens,
            documents=split.num_documents,
            bytes=split.num_bytes,
            seen=int(sequences) * length,
        )
        for name, split, sequences in zip(places, splits, used, strict=True)
    ]


def _files(place: Path) -> list[Source]:
    """The files of a single store, some together."""
    store = Store.open(place)
    documents = store.split("train").documents
    lines = (store.folder / "sources.jsonl").read_text(encoding="utf-8").splitlines()
    names = [str(json.loads(line)["name"]) for line in lines]
    tokens = np.diff(documents["end"], prepend=0)
    counts = [np.bincount(documents["file"], weights, len(names)) for weights in (tokens, documents["bytes"], None)]
    files = [
        Source(name=name, tokens=int(size), bytes=int(length), documents=int(many))
        for name, size, length, many in zip(names, *counts, strict=True)
        if many
    ]
    return _grouped(files)


def _grouped(files: list[Source]) -> list[Source]:
    """Files as they are where they are few, else by folder below the one that all share; the smallest together."""
    shared = os.path.commonpath([str(Path(file.name).parent) for file in files]) if len(files) > 1 else ""
    short = [dataclasses.replace(file, name=_below(file.name, shared)) for file in files]
    if len(short) > _MOST_SOURCES:
        tops = [file.name.split("/")[0] if "/" in file.name else "files at the top" for file in short]
        short = [dataclasses.replace(file, name=top) for file, top in zip(short, tops, strict=True)]
    merged = [_sum(name, list(several)) for name, several in _by_name(short)]
    merged.sort(key=lambda source: -source.tokens)
    if len(merged) > _MOST_SOURCES:
        rest = merged[_MOST_SOURCES - 1 :]
        merged = [*merged[: _MOST_SOURCES - 1], _sum(f"{len(rest)} others", rest)]
    return merged


def _below(name: str, shared: str) -> str:
    return os.path.relpath(name, shared) if shared else Path(name).name


def _by_name(sources: list[Source]) -> Any:
    ordered = sorted(sources, key=lambda source: source.name)
    return itertools.groupby(ordered, key=lambda source: source.name)


def _sum(name: str, sources: list[Source]) -> Source:
    return Source(
        name=name,
        tokens=sum(source.tokens for source in sources),
        documents=sum(source.documents for source in sources),
        bytes=sum(source.bytes for source in sources),
    )
