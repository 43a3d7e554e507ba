"""A process's signs of life for the supervisor that started it (`supervisor`), and the time that made progress.

The supervisor tells a process by MESHGPT_LAUNCH (JSON) where to write them and what was before. Without it nothing is
written.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from meshgpt.atomic import write_atomically
from meshgpt.settings import json_text, settings

VARIABLE = "MESHGPT_LAUNCH"
STARTING, STEPPING, SAVING, EVALUATING, FINISHING = "starting", "stepping", "saving", "evaluating", "finishing"
_PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Life:
    """What the processes did between a start and their end.

    first: the step that they began from, None if they never got so far. last: the newest step done.
    step_seconds: of a step, in the mean, without compilation, saves and evaluations; 0 while none was timed.
    """

    first: int | None = None
    last: int = 0
    step_seconds: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeartbeatRecord(Life):
    """A sign of life: the life so far, and what the process is at. `count` grows with each."""

    doing: str = STARTING
    count: int = 0

    def life(self) -> Life:
        return Life(first=self.first, last=self.last, step_seconds=self.step_seconds)


@settings()
class HangTimeouts:
    """For how long a process may show no sign of life before it counts as hung, in seconds.

    Between two steps: `steps` times the usual step, and at least `seconds`. start: before the second step.
    busy: in a save, an evaluation, or at the end of the run; others may have to wait for one that is so.
    """

    steps: float = 20.0
    seconds: float = 30.0
    start: float = 3600.0
    busy: float = 1800.0


class Listener:
    """Tells which process hangs, from the signs of all of them."""

    def __init__(self, timeouts: HangTimeouts, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeouts, self._clock = timeouts, clock
        self._heard: dict[int, tuple[int, float]] = {}  # of each process, the number of its newest sign, and when
        self.saving_at = 0.0  # when a process last gave a sign of a save

    def hung(self, records: Sequence[HeartbeatRecord | None], running: Sequence[subprocess.Popen[bytes]]) -> str:
        """The process that hangs and for how long, in words; "" where none does."""
        now, usual = self._clock(), max((record.step_seconds for record in records if record is not None), default=0.0)
        between = max(self._timeouts.steps * usual, self._timeouts.seconds)
        for number, record in enumerate(records):
            count = 0 if record is None else record.count
            if self._heard.get(number, (-1, 0.0))[0] != count:
                self._heard[number] = count, now
                if record is not None and record.doing == SAVING:
                    self.saving_at = now
        alive = [number for number, process in enumerate(running) if process.poll() is None]
        doing = {number: STARTING if (record := records[number]) is None else record.doing for number in alive}
        stepping = len(alive) == len(running) and all(what == STEPPING for what in doing.values())
        silent = {number: now - self._heard[number][1] for number in alive}
        limit = {number: self._limit(doing[number], between, stepping) for number in alive}
        stopped = [number for number in alive if silent[number] > between and _stopped(running[number].pid)]
        late = stopped or [number for number in alive if silent[number] > limit[number]]
        if not late:
            return ""
        # All wait for the one that hangs: it is the one that has come least far, or was stopped.
        stopped = stopped or [number for number in alive if _stopped(running[number].pid)]
        number = min(stopped or late, key=lambda number: self._last(records[number]))
        steps = f"; a step takes {usual:.2g} s" if doing[number] == STEPPING else ""
        state = "is stopped" if stopped else "hangs"
        where = f"while {doing[number]} after step {max(self._last(records[number]), 0):,}"
        return f"process {number} {state}: no sign of life for {silent[number]:.0f} s {where}{steps}"

    def _limit(self, doing: str, between: float, stepping: bool) -> float:
        if doing == STARTING:
            return self._timeouts.start
        return between if stepping else self._timeouts.busy

    @staticmethod
    def _last(record: HeartbeatRecord | None) -> int:
        return -1 if record is None else record.last


def _stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal; False where the system does not tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


def useful_seconds(lives: Sequence[Life]) -> float:
    """The time of the steps that count: those that a later life had to do again do not."""
    useful, beginning = 0.0, None
    for life in reversed(lives):
        if life.first is None:
            continue
        last = life.last if beginning is None else min(life.last, beginning)
        useful += max(0, last - life.first) * life.step_seconds
        beginning = life.first if beginning is None else min(beginning, life.first)
    return useful


def goodput(lives: Sequence[Life], since: float) -> float:
    """`useful_seconds` over all time since `since` (seconds since 1970), 0 to 1."""
    return min(1.0, useful_seconds(lives) / max(time.time() - since, 1e-3))


def orders(path: Path, since: float, lives: Sequence[Life]) -> dict[str, str]:
    """The environment of a process that is to write its signs into `path`; `lives` were before, since `since`."""
    before = [dataclasses.asdict(life) for life in lives]
    return {VARIABLE: json_text({"path": str(path), "since": since, "lives": before, "supervisor": os.getpid()})}


def read(path: Path) -> HeartbeatRecord | None:
    """The newest sign in a file; None where there is none yet."""
    try:
        return HeartbeatRecord(**json.loads(path.read_text(encoding="ascii")))
    except FileNotFoundError:
        return None


class Heartbeat:
    """The writing side. Times are those of `clock`, in seconds."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        told = json.loads(environment.get(VARIABLE, "null"))
        self._path = None if told is None else Path(told["path"])
        self._since = 0.0 if told is None else told["since"]
        self._lives = [] if told is None else [Life(**life) for life in told["lives"]]
        self._record = HeartbeatRecord()
        self._spent, self._timed = 0.0, 0
        self._waited, self._asked = 0.0, (0.0, 0, 0.0)  # spent, timed and waited when `own_seconds` was last called
        self._begun: float | None = None  # when the step under way began, as far as it is known
        if told is not None:
            _end_with(told["supervisor"])

    def begin(self, step: int) -> None:
        """Says that the run goes on from `step`; the first step after it compiles."""
        self._write(first=step, last=step)

    def beat(self, step: int) -> None:
        """Says that `step` is done."""
        now = time.monotonic()
        if self._begun is not None:
            self._spent, self._timed = self._spent + now - self._begun, self._timed + step - self._record.last
        self._begun = now
        if self._timed:
            self._write(last=step, step_seconds=self.step_seconds, doing=STEPPING)
        else:
            self._write(last=step)

    def alive(self) -> None:
        """Says that what takes long is making progress."""
        self._write()

    @contextlib.contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        """Says that the process is at something else than a step, which may take longer and is not a step's time."""
        before, begun = self._record.doing, time.monotonic()
        self._write(doing=doing)
        yield
        if self._begun is not None:
            self._begun += time.monotonic() - begun
        self._write(doing=before)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for the devices, in a step."""
        begun = time.monotonic()
        yield
        if self._begun is not None:
            self._waited += time.monotonic() - begun

    @property
    def step_seconds(self) -> float:
        """Of a step, in the mean; 0 while none was timed."""
        return self._spent / self._timed if self._timed else 0.0

    def own_seconds(self) -> float:
        """Of a step, since the last call: what this process did not spend in `waiting`; 0 where none was timed."""
        spent, timed, waited = self._asked
        self._asked = self._spent, self._timed, self._waited
        return max(0.0, self._spent - spent - self._waited + waited) / max(1, self._timed - timed)

    def metrics(self) -> dict[str, float]:
        """Of a supervised run: `restarts`, and `goodput`, the part of the time since the launch that made progress."""
        if self._path is None:
            return {}
        return {"restarts": len(self._lives), "goodput": goodput([*self._lives, self._record], self._since)}

    def _write(self, **changed: int | float | str) -> None:
        self._record = dataclasses.replace(self._record, count=self._record.count + 1, **changed)  # type: ignore[arg-type]
        if self._path is None:
            return
        with contextlib.suppress(OSError):  # a full disk for temporary files is no reason to stop training
            write_atomically(self._path, json_text(dataclasses.asdict(self._record)), durable=False)


def _end_with(supervisor: int) -> None:
    """Lets this process save and stop when its supervisor is killed, instead of going on unwatched."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        try:
            os.kill(supervisor, 0)
        except ProcessLookupError:  # it was killed before this process asked to be told
            os.kill(os.getpid(), signal.SIGTERM)
