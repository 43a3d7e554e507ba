"""What is done to a run, when, and to which of its processes."""

import dataclasses
import enum
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from meshgpt.chaos.disk import Disk
from meshgpt.checkpoint import manifest
from meshgpt.checkpoint.manager import completed_steps
from meshgpt.distributed.heartbeat import STEPPING
from meshgpt.distributed.supervisor import Scene

_SLOW_SECONDS = 5.0
_USUAL_START = 4.0  # seconds, until a start was timed
_FLIPPED_BITS = 3


class Kind(enum.StrEnum):
    """The faults."""

    STEP = "SIGKILL in a step"
    SAVE = "SIGKILL in a save"
    START = "SIGKILL in start-up"
    STOP = "SIGSTOP in a step"
    FULL = "full disk"
    FLIP = "flipped bits in the newest checkpoint, and SIGKILL"
    SLOW = "slow storage"


_DECK = (*[Kind.STEP] * 3, *[Kind.SAVE] * 3, *[Kind.START] * 2, Kind.STOP, Kind.FULL, Kind.FLIP, Kind.SLOW)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """kind: what. after: not before this step is done. victim, delay: which process, and how much later; 0 to 1."""

    kind: Kind
    after: int
    victim: float
    delay: float


def plan(count: int, seed: int, steps: int) -> list[Fault]:
    """`count` faults spread over `steps`, every kind among them where there are at least as many as kinds."""
    rng = random.Random(seed)
    kinds = list(Kind)[:count]
    while len(kinds) < count:
        kinds += rng.sample(_DECK, len(_DECK))[: count - len(kinds)]
    others = [kind for kind in kinds if kind is not Kind.START]
    rng.shuffle(others)
    order = list(others)
    for _ in range(kinds.count(Kind.START)):
        # A start-up is there to be disturbed only after a fault that has brought the processes down.
        place = rng.choice([index for index, kind in enumerate(order) if kind is not Kind.SLOW])
        order.insert(place + 1, Kind.START)
    faults, spread = [], 0
    for kind in order:
        spread += kind is not Kind.START
        after = steps * spread // (len(others) + 1)
        faults.append(Fault(kind=kind, after=after, victim=rng.random(), delay=rng.random()))
    return faults


@dataclasses.dataclass
class _Seen:
    """What was seen of one life. spent: it has had its fault."""

    processes: object = None
    begun: bool = False
    spent: bool = False
    since: float = dataclasses.field(default_factory=time.monotonic)
    wall_clock: float = dataclasses.field(default_factory=time.time)


class Injector:
    """Does the faults in order, one when its moment has come. To be called with what the supervisor sees."""

    def __init__(self, faults: list[Fault], checkpoints: Path, disk: Disk, slow: Path, done: Callable[[dict], None]):
        """`slow`: a file that makes the storage slow while it is there. `done` takes the record of each fault."""
        self.pending = list(faults)
        self.disk_is_full = False
        self._checkpoints, self._disk, self._slow, self._done = checkpoints, disk, slow, done
        self._start_seconds = _USUAL_START
        self._life = _Seen()
        self._moment: float | None = None  # of the fault that is next
        self._slow_since = 0.0

    def __call__(self, scene: Scene) -> None:
        now = time.monotonic()
        begun = scene.signs[0] is not None and scene.signs[0].first is not None
        if self._life.processes is not scene.processes:
            self._life, self._moment = _Seen(scene.processes), None
        if begun and not self._life.begun:
            self._life.begun, self._start_seconds = True, now - self._life.since
        if self._slow_since:
            self._end_slowness(now)
        elif self.pending and not self._life.spent:
            fault = self.pending[0]
            if self._moment is None and self._is_near(fault, scene, begun):
                usual = 2 * scene.signs[0].step_seconds if scene.signs[0] is not None else 0.0
                later = {Kind.START: self._start_seconds, Kind.SAVE: 0.05}.get(fault.kind, usual)
                self._moment = now + fault.delay * later
            if self._moment is not None and (now >= self._moment or (fault.kind is Kind.START and begun)):
                self._act(fault, scene)

    def _is_near(self, fault: Fault, scene: Scene, begun: bool) -> bool:
        """Whether the place is reached that the fault belongs to."""
        if fault.kind is Kind.START:
            return not begun
        sign = scene.signs[0]
        if sign is None or not begun or sign.last < fault.after:
            return False
        if fault.kind is Kind.SAVE:
            return self._is_saving()
        if fault.kind is Kind.FLIP:
            # The one before must be intact: that a run with damaged checkpoints only cannot go on is no news.
            done = completed_steps(self._checkpoints)
            return len(done) >= 2 and _intact(self._checkpoints / str(done[-2]))
        return sign.doing == STEPPING

    def _is_saving(self) -> bool:
        """Whether a save has begun in this life that is not complete."""
        try:
            paths = {path.name: path for path in self._checkpoints.iterdir()}
            return any(
                (".orbax-checkpoint-tmp" in name or (name.isdigit() and f"{name}{manifest.SUFFIX}" not in paths))
                and path.stat().st_mtime > self._life.wall_clock
                for name, path in paths.items()
            )
        except FileNotFoundError:  # no folder yet, or renamed at this moment
            return False

    def _act(self, fault: Fault, scene: Scene) -> None:
        self.pending.pop(0)
        self._moment = None
        number = int(fault.victim * len(scene.processes))
        pid, sign = scene.processes[number].pid, scene.signs[number]
        record = {"kind": fault.kind.value, "process": number, "step": 0 if sign is None else sign.last}
        record["doing"] = "starting" if sign is None else sign.doing
        self._life.spent = fault.kind is not Kind.SLOW
        if fault.kind is Kind.SLOW:
            self._slow.touch()
            self._slow_since = time.monotonic()
        elif fault.kind is Kind.STOP:
            os.kill(pid, signal.SIGSTOP)
        elif fault.kind is Kind.FULL:
            self.disk_is_full = True
            self._disk.fill([process.pid for process in scene.processes if process.poll() is None])
        else:
            if fault.kind is Kind.FLIP:
                record["flipped"] = flip(self._checkpoints, random.Random(fault.delay))
            scene.processes[number].kill()
        self._done(record)

    def _end_slowness(self, now: float) -> None:
        if now - self._slow_since > _SLOW_SECONDS:
            self._slow.unlink(missing_ok=True)
            self._slow_since = 0.0


def flip(checkpoints: Path, rng: random.Random) -> str:
    """Changes bits of the newest complete checkpoint; says where."""
    newest = completed_steps(checkpoints)[-1]
    files = sorted(path for path in (checkpoints / str(newest)).rglob("*") if path.is_file() and path.stat().st_size)
    path = rng.choices(files, [file.stat().st_size for file in files])[0]
    with open(path, "r+b") as file:
        for _ in range(_FLIPPED_BITS):
            offset = rng.randrange(path.stat().st_size)
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))
    return str(path.relative_to(checkpoints))


def _intact(step: Path) -> bool:
    try:
        manifest.verify(step)
    except manifest.DamagedError:
        return False
    return True
