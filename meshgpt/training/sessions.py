"""How long a run took and on what, over all its restarts: `sessions.json` in the run's folder.

One object a session (a process that trained), in order: `started` and `seen` (UTC, ISO 8601), `seconds` between them,
`first_step` and `last_step` (done in this session: last - first), `devices`, `device_kind`, `processes`, for the model
`parameters` and `flops_per_token`, `jax` (its version), and where they were set `xla_flags` and `libtpu_init_args`. A
session that was killed counts up to its last heartbeat.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from meshgpt.atomic import write_atomically
from meshgpt.settings import json_text

HEARTBEAT_SECONDS = 10.0
_NUMBERS = ("seconds", "first_step", "last_step", "devices", "processes", "parameters", "flops_per_token")


class Session:
    """Writes this process's part of the file, and writes it again every `HEARTBEAT_SECONDS`. A `trackers.Tracker`."""

    def __init__(
        self, path: Path, first_step: int, facts: Mapping[str, Any], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`facts` are the fields that do not change: of the devices and of the model."""
        self._path, self._clock, self._begun = path, clock, clock()
        self._earlier = read_sessions(path)
        self._entry = {"started": _now(), "first_step": first_step, **facts}
        self._step = first_step
        self._write()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records that `step` is done, and writes the file if it is time to."""
        del metrics
        self._step = step
        if self._clock() - self._written >= HEARTBEAT_SECONDS:
            self._write()

    def message(self, text: str) -> None:
        """Does nothing: the file holds figures only."""

    def close(self) -> None:
        self._write()

    def _write(self) -> None:
        self._written = self._clock()
        seconds = round(self._written - self._begun, 3)
        entry = self._entry | {"seen": _now(), "seconds": seconds, "last_step": self._step}
        write_atomically(self._path, json_text([*self._earlier, entry], indent=1) + "\n")


def read_sessions(path: Path) -> list[dict[str, Any]]:
    """The sessions in a file; what is damaged or not of this form is left out, and [] stands for no file."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return []
    return [entry for entry in entries if _valid(entry)] if isinstance(entries, list) else []


def _valid(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("device_kind"), str)
        and all(type(entry.get(name)) in (int, float) and entry[name] >= 0 for name in _NUMBERS)
    )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
