"""The folder of a run: what it holds, who may write it, and whether a run may go on in it."""

import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import meshgpt
from meshgpt.atomic import write_atomically
from meshgpt.checkpoint import manifest
from meshgpt.checkpoint.manager import completed_steps, read_metadata
from meshgpt.config import Run, changes, from_json, may_change, may_differ, to_json
from meshgpt.data.batch_sizes import BatchSizes
from meshgpt.errors import UserError, explained
from meshgpt.settings import json_text

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers", "sentencepiece")
# What `--resume never` leaves in place: the prepared text is the same, and the supervisor's files are in use.
_KEPT_ASIDE = ("data", "run.lock", "logs", "restarts.jsonl")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunFolder:
    """Paths of a run's files (README, "A run's folder")."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.origin = path / "init.json"
        self.sessions = path / "sessions.json"
        self.restarts = path / "restarts.jsonl"
        self.evals = path / "evals"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples.txt"
        self.plot = path / "loss.png"
        self.export = path / "export"
        self.data = path / "data"
        self.ledger = path / "data.json"
        self.tokenizer = path / "tokenizer"
        # `teacher`, `teacher_val_loss`, `student_start_val_loss` (nats a token, of the held-out text),
        # and `teacher_evals`, `student_start_evals`: figures of the files and tasks of `Run.evals`, by their names in
        # metrics.jsonl.
        self.distillation = path / "distillation.json"

    def read_run(self) -> Run:
        """The configuration of the run in this folder.

        Raises:
          UserError: no run here, or one that this version cannot read.
        """
        return from_json(Run, self._configuration())

    def holds_run(self) -> bool:
        """Whether a run is here: its record, or without it checkpoints, which have the configuration too."""
        return self.record.is_file() or self._saved_configuration() is not None

    def finished_step(self) -> int | None:
        """The step of the samples, the export and the loss curve; None before there are any."""
        return self._read_record().get("finished_step") if self.record.is_file() else None

    def record_run(self, run: Run, command: str, begun: Mapping[str, Any] | None = None) -> None:
        """Writes `run.json`: what is done here from now on; `begun` is what `init_state.Start.metadata` says of before.

        `started` stays that of the run's first session.
        """
        record = _record(run, command)
        earlier = self._read_record() if self.record.is_file() else {}
        kept = {"started": earlier.get("started", record["started"]), "finished_step": earlier.get("finished_step")}
        self._write_record(record | kept | dict(begun or {}))

    def batch_sizes(self) -> BatchSizes:
        """Of the run in this folder, step by step."""
        record = self._read_record()
        return BatchSizes.from_json(record.get("batch_sizes") or [[0, record["run"]["global_batch"]]])

    def mark_finished(self, step: int) -> None:
        """Says that everything that a run leaves at its end is there, as of `step`."""
        self._write_record(self._read_record() | {"finished_step": step})

    def diverged_step(self) -> int | None:
        """The step at which the run gave up, as `mark_diverged` has it; None where it did not, or was started again."""
        return self._read_record().get("diverged_step") if self.record.is_file() else None

    def mark_diverged(self, step: int) -> None:
        """Says that the run gave up at `step`, since its losses, gradients or updates were not finite."""
        self._write_record(self._read_record() | {"diverged_step": step})

    def _read_record(self) -> dict[str, Any]:
        if not self.record.is_file():
            raise UserError(f"{self.path} holds no run: there is no {self.record.name} in it")
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            if isinstance(record["run"], dict):
                return record
        except (ValueError, KeyError, TypeError):
            pass
        remedy = (
            "start the training command again with --resume never: nothing was saved here, and what is is set aside"
            if self._saved_configuration() is None
            else "delete this one file and start the training command again: it goes on from the newest checkpoint, "
            "which has the configuration too"
        )
        raise UserError(f"{self.record} is damaged, as a power failure could leave it in older versions; {remedy}")

    def _configuration(self) -> dict[str, Any]:
        saved = None if self.record.is_file() else self._saved_configuration()
        return self._read_record()["run"] if saved is None else saved

    def _saved_configuration(self) -> dict[str, Any] | None:
        """That of the newest checkpoint; None where there is none of a run."""
        steps = completed_steps(self.checkpoints)
        saved = read_metadata(self.checkpoints, steps[-1]).get("run") if steps else None
        return saved if isinstance(saved, dict) else None

    @contextmanager
    def claimed(self, run: Run, command: str, report: Callable[[str], None]) -> Iterator[None]:
        """Makes the folder this run's, for this process alone. An earlier `run.json` stays until `record_run`.

        Raises:
          UserError: another process is at work here; the folder holds something else, or a run whose configuration
            differs in a way that cannot resume (named); `run.resume` forbids what would have to be done; or, at any
            time within, the disk is full.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / "run.lock", "a")  # noqa: SIM115 (the `with` below closes it)
        except OSError as error:
            text = f"cannot write to the run's folder {self.path}: {error.strerror}; give another --run-dir"
            raise explained(error, text) from error
        with lock, self._full_disk_explained():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"another process is training in {self.path}: wait for it or stop it") from error
            if run.resume == "never":
                self._set_aside(report)
            elif self.holds_run():
                self._check_same(run, report)
            elif run.resume == "must":
                raise UserError(f"--resume must: {self.path} holds no run to go on with")
            self._check_nothing_else()
            if not self.record.is_file():
                self.record_run(run, command)
            yield

    @contextmanager
    def _full_disk_explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise UserError(
                f"cannot write to {error.filename or self.path}: the disk (or a quota, or the file size limit) is "
                "full. The checkpoints saved before are intact. Free space, then start the same command again to resume"
            ) from error

    def _check_same(self, run: Run, report: Callable[[str], None]) -> None:
        if not any(self.checkpoints.glob(f"*{manifest.SUFFIX}")):
            return  # nothing was trained that another configuration could spoil
        found = changes(self._configuration(), run)
        locked = [change for change in found if not may_differ(change[0])]
        changed = all(may_change(name) for name, _, _ in locked)
        if locked and not (changed and run.resume_with_changes):
            said = "; ".join(f"{name} was {old!r}, now {new!r}" for name, old, new in locked[:5])
            switch = "--resume-with-changes to go on with the new ones from here, " if changed else ""
            raise UserError(
                f"{self.path} holds a run that cannot go on with this configuration: {said}. "
                f"Give the old value, {switch}another --run-dir, or --resume never to start afresh (the old run is set "
                "aside)"
            )
        for name, old, new in found:
            if name not in ("resume", "run_dir", "resume_with_changes"):
                report(f"resuming with {name} {new!r} (was {old!r})")

    def _check_nothing_else(self) -> None:
        ours = (*_KEPT_ASIDE, f"{self.record.name}.tmp")
        foreign = [p.name for p in self.path.iterdir() if p.name not in ours]
        if foreign and not self.holds_run():
            raise UserError(
                f"{self.path} is not empty and holds no run (it has {min(foreign)}): give an empty or new --run-dir"
            )

    def _set_aside(self, report: Callable[[str], None]) -> None:
        if not self.holds_run():
            return
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.previous-{number}")).exists():
            number += 1
        aside.mkdir()
        # The record goes last: a kill on the way leaves a folder that is still known as a run's.
        for entry in sorted(self.path.iterdir(), key=lambda path: path == self.record):
            if entry.name not in _KEPT_ASIDE:
                os.replace(entry, aside / entry.name)
        report(f"the earlier run is now in {aside}")

    def _write_record(self, record: dict[str, Any]) -> None:
        write_atomically(self.record, json_text(record, indent=2) + "\n")


def _record(run: Run, command: str) -> dict[str, Any]:
    return {
        "meshgpt": meshgpt.__version__,
        "run": to_json(run),
        "seed": run.seed,
        "command": command,
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _git_revision() -> str | None:
    """The revision of the package's checkout, with "+changes" where it is not clean; None outside of one."""
    here = Path(meshgpt.__file__).resolve().parent
    try:
        revision = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return revision.stdout.strip() or None
