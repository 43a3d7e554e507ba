"""SIGTERM and Ctrl-C, to one process or to any of a run's: when it stops, and how.

Where steps are done that are not saved (`deferred`), all processes stop at the same point of their work and save.
Anywhere else nothing is lost, and they leave at once. A thread hears the signals: Python's own handlers wait while the
main thread compiles, reads a checkpoint or waits for other processes. JAX's preemption service does not serve: it hears
SIGTERM only where steps are counted, and swallows it elsewhere.
"""

import contextlib
import dataclasses
import math
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from meshgpt.errors import INTERRUPTED

_KINDS = (signal.SIGINT, signal.SIGTERM)
_POLL_SECONDS = 0.5  # between two looks whether another process was asked to stop
_UNWIND_SECONDS = 5.0  # for the main thread to put away what is under way; then the process ends where it is
_HURRY_SECONDS = 1.0  # ... after a second Ctrl-C
_FAREWELL_SECONDS = 5.0  # for which process 0, whose end the others notice, waits for them to have left
_SAVED = 1 << 60  # as a number of points: beyond any in the loop
_ASKED, _POINTS, _LEFT = "meshgpt/stop/asked/", "meshgpt/stop/points/", "meshgpt/stop/left/"


class Stopped(BaseException):
    """What is under way is abandoned, at the same point on all processes, since a stop was asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Peers:
    """The processes of a run: JAX's key-value store, this one's number, and how many there are."""

    store: Any
    number: int
    count: int

    def say(self, key: str, text: str = "") -> None:
        self.store.key_value_set(f"{key}{self.number}", text, True)

    def heard(self, key: str) -> list[str]:
        try:
            return [text for _, text in self.store.key_value_dir_get(key)]
        except Exception:  # the coordinator is gone, on which JAX ends this process
            return []


class StopRequests:
    """The requests to stop that reach this process. The main thread calls the methods without an underscore."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held while processes agree where to stop: none passes a point meanwhile
        self._points = 0  # that the main thread has passed since steps are done
        self._stop_at = 0  # the point at which all stop, once they have agreed
        self._deferred = self._asked = self._reached = self._raised = False
        self._deadline = math.inf
        self._peers: _Peers | None = None
        self._closed = threading.Event()
        self.leaving = False
        self.code, self.text = 130, f"{INTERRUPTED}\n"

    def asked(self) -> bool:
        """Passes a point of the work that all processes pass alike; True from the one on where all are to stop."""
        with self._lock:
            self._points += 1
            self._reached = self._reached or self._points == self._stop_at
            return self._reached

    def saved(self, text: str) -> None:
        """Says that nothing is lost from here on: a stop ends the process at once, with code 0 and `text`."""
        with self._lock:
            self._deferred, self._points = False, _SAVED
            self.code, self.text = 0, text

    @contextlib.contextmanager
    def _deferring(self) -> Iterator[None]:
        with self._lock:
            self._deferred = True
        try:
            yield
        finally:
            with self._lock:
                self._deferred = False

    def _handle(self, number: int, frame: object) -> None:
        """Python's handler, in the main thread; the signal itself was heard by `_listen`."""
        del number, frame
        if self.leaving and not self._raised:
            self._raised = True
            raise KeyboardInterrupt

    def _listen(self, pipe: int) -> None:
        while not self._closed.is_set():
            ready, _, _ = select.select([pipe], [], [], 0.1 if self.leaving else _POLL_SECONDS)
            numbers = [number for number in os.read(pipe, 64) if number in _KINDS] if ready else []
            if numbers.count(signal.SIGINT) > (0 if self._asked else 1):
                self._leave(_HURRY_SECONDS)
            if not self._asked and (numbers or (self._peers is not None and self._peers.heard(_ASKED))):
                self._agree()
            if self._asked and not (self.leaving or self._deferred or self._reached):
                self._leave(_UNWIND_SECONDS)
            if time.monotonic() > self._deadline and not self._closed.is_set():
                self._end()

    def _agree(self) -> None:
        """All stop at the first point that none of them has passed; they leave at once where none has passed any."""
        with self._lock:
            points = [self._points]
            if self._peers is not None:
                self._peers.say(_ASKED)
                self._peers.say(_POINTS, str(self._points))
                while len(told := self._peers.heard(_POINTS)) < self._peers.count and not self._closed.is_set():
                    time.sleep(0.05)
                points += [int(text) for text in told]
            self._asked, self._stop_at = True, max(points) + 1
            nothing_lost = max(points) == 0
        if nothing_lost:
            self._leave(_UNWIND_SECONDS)

    def _leave(self, seconds: float) -> None:
        self.leaving, self._deadline = True, time.monotonic() + seconds
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)  # it may sleep or wait for a lock

    def _end(self) -> None:
        """Ends the process, whose main thread does not come back from where it is."""
        with contextlib.suppress(OSError):  # not by `print`: the main thread may hold the stream
            os.write(1 if self.code == 0 else 2, f"{self.text}\n".lstrip("\n").encode())
        self._say_farewell()
        os._exit(self.code)

    def _say_farewell(self) -> None:
        if self._peers is None:
            return
        with contextlib.suppress(Exception):  # process 0, which keeps the store, may be gone
            self._peers.say(_LEFT)
            until = time.monotonic() + _FAREWELL_SECONDS
            while self._peers.number == 0 and len(self._peers.heard(_LEFT)) < self._peers.count:
                if time.monotonic() > until:
                    return
                time.sleep(0.05)


_current: StopRequests | None = None  # while this process listens
_last: StopRequests | None = None


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Within it, signals stop this process as this module says. In another thread than the main one it does nothing."""
    global _current, _last
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    requests = StopRequests()
    read, write = os.pipe()
    os.set_blocking(write, False)
    _current = _last = requests
    handlers = {kind: signal.signal(kind, requests._handle) for kind in _KINDS}
    pipe_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    thread = threading.Thread(target=requests._listen, args=(read,), daemon=True, name="stop requests")
    thread.start()
    try:
        yield
    finally:
        _current = None
        requests._closed.set()
        signal.set_wakeup_fd(pipe_before)
        for kind, handler in handlers.items():
            signal.signal(kind, handler or signal.SIG_DFL)
        os.write(write, b"\0")
        thread.join(1.0)
        for descriptor in (read, write) if not thread.is_alive() else ():
            os.close(descriptor)


def join(store: Any, number: int, count: int) -> None:
    """Says that this process is one of several, whose requests it hears from now on."""
    if _current is not None:
        _current._peers = _Peers(store=store, number=number, count=count)


@contextlib.contextmanager
def deferred() -> Iterator[StopRequests]:
    """Within it a stop waits until all processes have come to the same point (`StopRequests.asked`)."""
    with contextlib.ExitStack() as stack:
        if _current is None:
            stack.enter_context(listening())
        requests = _current or StopRequests()  # in another thread none arrives
        if _current is not None:  # libraries take the signals when devices start, as libtpu does
            for kind in _KINDS:
                signal.signal(kind, _current._handle)
        stack.enter_context(requests._deferring())
        yield requests


def check() -> None:
    """Passes a point, as `StopRequests.asked` does, within something long that is not a step.

    Raises:
      Stopped: all stop here.
    """
    if _current is not None and _current._deferred and _current.asked():
        raise Stopped


def leaving() -> bool:
    """Whether this process was asked to leave at once."""
    return _last is not None and _last.leaving


def saved_text() -> str | None:
    """What `StopRequests.saved` was given; None where it was not called, and a stop has the code 130."""
    return _last.text if _last is not None and _last.code == 0 else None


def say_farewell() -> None:
    """Before a process that leaves ends: process 0 waits, for a few seconds, until the others have left."""
    if _last is not None:
        _last._say_farewell()
