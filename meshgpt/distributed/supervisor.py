"""N processes of one run on this machine, kept going.

One that dies, or hangs, brings all of them down at once; they are started again and go on from the newest intact
checkpoint, later each time that nothing was gained, and not for ever.
"""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from meshgpt.distributed import heartbeat
from meshgpt.distributed.heartbeat import HangTimeouts, HeartbeatRecord, Life, Listener
from meshgpt.errors import UserError
from meshgpt.settings import json_text, settings

_USER_ERROR = 2  # an exit code that another start would meet again
_PORT_TAKEN = 4  # ... that another port mends
_MOST_PORTS = 10  # that one start tries
_CLEAN = (0, 130)  # of a process that was asked to stop: saved, or nothing to save yet
_ROOT_CAUSE_SECONDS = 0.5  # the others of a process that died follow within so long
_LONGEST_PAUSE = 60.0
_TAIL_LINES = 3
_NOISE = ("[Gloo]", "@ ", "***")  # of the peers at every start; of a stack that a signal interrupted


@settings()
class Patience:
    """When to act. Times in seconds.

    max_restarts: in a row without a checkpoint gained, before giving up. timeouts: when a process counts as hung.
    grace: after SIGTERM, and after the last sign of a save that makes progress. pause: before the first restart, twice
    as long before the second that gains nothing, and so on. poll: between two looks. deadline: the processes' own,
    within which all must have found each other; 0 leaves it to the environment.
    """

    max_restarts: int = 5
    timeouts: HangTimeouts = HangTimeouts()
    grace: float = 120.0
    pause: float = 1.0
    poll: float = 0.05
    deadline: float = 0.0


@settings()
class Layout:
    """How many processes, and the virtual CPU devices of each; 0 leaves the devices to the environment.

    port: of the coordinator on the loopback interface; 0 takes a free one, another at each start.
    """

    processes: int
    devices: int = 0
    port: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """What the supervisor sees at one moment: the processes, their newest signs of life, and how many lives were."""

    processes: Sequence[subprocess.Popen[bytes]]
    signs: Sequence[HeartbeatRecord | None]
    lives: int


class Supervisor:
    """Runs a command in several processes until all of them end well."""

    def __init__(
        self,
        command: Callable[[int, bool], Sequence[str]],
        layout: Layout,
        folder: Path,
        patience: Patience,
        say: Callable[[str], None],
        *,
        fewer: Callable[[int], int] | None = None,
        look: Callable[[Scene], None] | None = None,
        quiet: bool = False,
    ) -> None:
        """Args:
        command: what to run, for a number of processes; True: the run has begun before, and is to be gone on with.
        folder: of the run. `restarts.jsonl` in it gets a line a restart, `logs/` the output of all but process 0.
        fewer: gives the number of processes to go on with after one of so many has died; None: as many.
        look: is called at every look at the processes.
        quiet: the output of process 0 goes into `logs/` too.
        """
        self._command, self._layout, self._folder, self._patience, self._say = command, layout, folder, patience, say
        self._fewer, self._look, self._quiet = fewer, look, quiet
        self._stopping = 0.0  # when it was asked to stop
        self._impatient = False  # ... twice
        self._log_sizes: dict[int, int] = {}  # when this life began
        self.lives: list[Life] = []
        self.since = time.time()

    @property
    def stopping(self) -> bool:
        """Whether a signal asked it to stop."""
        return bool(self._stopping)

    def run(self) -> int:
        """Until the end; gives the exit code: 0, or that of the process that ended it.

        Raises:
          UserError: the folder cannot be written to.
        """
        fruitless, best = 0, -1
        try:
            (self._folder / "logs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to the run's folder {self._folder}: {error.strerror}") from error
        with self._signals(), tempfile.TemporaryDirectory(prefix="meshgpt-launch-") as scratch:
            while True:
                code, reason = self._life(Path(scratch))
                first = self.lives[-1].first
                if code == 0 or code == _USER_ERROR or self._stopping:
                    return self._ended(code, reason)
                gained = first is not None and first > best
                fruitless, best = (1 if gained else fruitless + 1), max(best, first or 0)
                if fruitless > self._patience.max_restarts:
                    self._say(f"{reason}; gave up after {fruitless - 1} restarts in a row without a checkpoint gained")
                    return code
                if self._fewer is not None:
                    self._layout = dataclasses.replace(self._layout, processes=self._fewer(self._layout.processes))
                pause = min(self._patience.pause * 2 ** (fruitless - 1), _LONGEST_PAUSE)
                self._record(reason)
                self._say(f"{reason}; restart {len(self.lives)}, {self._layout.processes} processes, in {pause:g} s")
                self._wait(pause)
                if self._stopping:
                    return 130

    def _ended(self, code: int, reason: str) -> int:
        if reason and code != 0:
            self._say(f"{reason}{'; not restarted: this is for you to mend' if code == _USER_ERROR else ''}")
        if len(self.lives) > 1:
            self._say(f"{len(self.lives) - 1} restarts, goodput {heartbeat.goodput(self.lives, self.since):.1%}")
        return code

    def _life(self, scratch: Path) -> tuple[int, str]:
        """One life of all processes: an exit code, and why it ended."""
        code, reason, sign = 1, "", None
        for _ in range(_MOST_PORTS):
            with self._started(scratch) as (running, paths):
                code, reason = self._watched(running, paths)
                sign = heartbeat.read(paths[0])
            if code != _PORT_TAKEN or self._stopping:
                break
            self._say("another program has taken the coordinator's port; trying another one")
        self.lives.append(Life() if sign is None else sign.life())
        return code, reason

    @contextlib.contextmanager
    def _started(self, scratch: Path) -> Iterator[tuple[list[subprocess.Popen[bytes]], list[Path]]]:
        count, number_of_life = self._layout.processes, len(self.lives)
        common = {**os.environ, **self._environment()}
        command = self._command(count, any(life.first is not None for life in self.lives))
        paths = [scratch / f"{number_of_life}-{number}" for number in range(count)]
        running: list[subprocess.Popen[bytes]] = []
        try:
            for number, path in enumerate(paths):
                own = heartbeat.orders(path, self.since, self.lives)
                own |= {"MESHGPT_PROCESS_ID": str(number)} if count > 1 else {}
                with open(self._log(number), "ab") as log:
                    self._log_sizes[number] = log.tell()
                    output = log if number or self._quiet else None
                    # A session of its own: Ctrl-C in the terminal is for the supervisor, which passes it on.
                    running.append(
                        subprocess.Popen(
                            command, env=common | own, stdout=output, stderr=output, start_new_session=True
                        )
                    )
            yield running, paths
        finally:
            for process in running:
                process.kill()
            for process in running:
                process.wait()

    def _environment(self) -> dict[str, str]:
        """Of every process. One alone is no pod, unless the environment already makes it a part of one."""
        layout = self._layout
        chosen = {}
        if layout.devices:
            chosen |= {"JAX_NUM_CPU_DEVICES": str(layout.devices)}
            chosen |= {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
        if self._patience.deadline:
            chosen |= {"MESHGPT_DEADLINE": str(self._patience.deadline)}
        if layout.processes > 1:
            chosen |= {"MESHGPT_COORDINATOR": f"127.0.0.1:{layout.port or _free_port()}"}
            chosen |= {} if layout.port else {"MESHGPT_ANY_PORT": "1"}
            chosen |= {"MESHGPT_PROCESSES": str(layout.processes)}
        return chosen

    def _log(self, number: int) -> Path:
        return self._folder / "logs" / f"process-{number}.log"

    def _watched(self, running: list[subprocess.Popen[bytes]], paths: list[Path]) -> tuple[int, str]:
        """Returns when all have ended well, one has not, or one hangs: (exit code, reason)."""
        listener, passed_on = Listener(self._patience.timeouts), False
        while True:
            codes = [process.poll() for process in running]
            if any(code not in (None, 0) for code in codes):
                if self._stopping:
                    self._wait_for_all(running)
                return self._first_to_die(running)
            if all(code == 0 for code in codes):
                return 0, ""
            signs = [heartbeat.read(path) for path in paths]
            if self._look is not None:
                self._look(Scene(processes=running, signs=signs, lives=len(self.lives)))
            if self._stopping and not passed_on:
                passed_on = True
                for process in running:
                    process.terminate()
            if hung := listener.hung(signs, running):
                return 1, hung
            since = max(self._stopping, listener.saving_at)
            if self._impatient or (passed_on and time.monotonic() - since > self._patience.grace):
                return 1, "the processes were killed before they had saved"
            time.sleep(self._patience.poll)

    def _wait_for_all(self, running: list[subprocess.Popen[bytes]]) -> None:
        """After SIGTERM one may end before the others; they have the rest of their time."""
        until = self._stopping + self._patience.grace
        while any(process.poll() is None for process in running) and time.monotonic() < until and not self._impatient:
            time.sleep(self._patience.poll)

    def _first_to_die(self, running: list[subprocess.Popen[bytes]]) -> tuple[int, str]:
        """The exit code and the reason: of those that follow each other, a mistake, a port or a signal is the cause."""
        time.sleep(_ROOT_CAUSE_SECONDS)
        ended = [(number, process.poll()) for number, process in enumerate(running)]
        bad = [(number, code) for number, code in ended if code not in (None, 0)]
        if self._stopping:
            worst = next((code for _, code in bad if code not in (*_CLEAN, -signal.SIGTERM)), 130)
            return worst, ""
        number, code = min(bad, key=lambda one: (one[1] not in (_USER_ERROR, _PORT_TAKEN), one[1] >= 0))
        return (128 - code if code < 0 else code), f"process {number} {_described(code)}{self._tail(number)}"

    def _tail(self, number: int) -> str:
        if number == 0 and not self._quiet:
            return ""
        with open(self._log(number), errors="replace") as log:
            log.seek(self._log_sizes[number])  # what an earlier life wrote is not the reason
            lines = [line.strip() for line in log]
        lines = [line for line in lines if line and not line.startswith(_NOISE)][-_TAIL_LINES:]
        return f" ({self._log(number)} ends: {' / '.join(lines)})" if lines else ""

    def _record(self, reason: str) -> None:
        life = self.lives[-1]
        entry = {
            "restart": len(self.lives),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "reason": reason,
            "began_at_step": life.first,
            "last_step": life.last,
            "processes": self._layout.processes,
            "goodput": round(heartbeat.goodput(self.lives, self.since), 4),
        }
        try:
            with open(self._folder / "restarts.jsonl", "a", encoding="utf-8") as file:
                file.write(json_text(entry) + "\n")
        except OSError as error:  # the disk may be what the processes died of
            self._say(f"cannot write {error.filename}: {error.strerror}")

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._stopping:
            time.sleep(self._patience.poll)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int, frame: object) -> None:
            del number, frame
            self._impatient, self._stopping = bool(self._stopping), self._stopping or time.monotonic()

        kinds = [
            kind for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(kind) != signal.SIG_IGN
        ]
        before = {kind: signal.signal(kind, stop) for kind in kinds}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)


def _described(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
