"""Where the wall time of a training loop goes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self, TypeVar

import jax

from meshgpt.distributed.heartbeat import EVALUATING, SAVING
from meshgpt.training.trackers import duration

DATA, COMPILING = "data", "compiling"
_WORDS = {
    DATA: "waiting for data",
    COMPILING: "compiling",
    EVALUATING: "evaluating",
    SAVING: "saving",
}
_COMPILED = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")
T = TypeVar("T")


class Clock:
    """Seconds by what the loop was at. What is left is training steps: goodput is their share.

    Steps run on the devices while the loop does other things, so that the share of steps is a lower bound. While it is
    entered, what JAX compiles counts as compiling and not as what the loop was at: the first evaluation has a program
    of its own.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._begun = now, now()
        self._spent = dict.fromkeys(_WORDS, 0.0)
        self._at: str | None = None

    def __enter__(self) -> Self:
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event in _COMPILED and self._at != COMPILING:
            self._spent[COMPILING] += duration_secs
            if self._at is not None:
                self._spent[self._at] -= duration_secs

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Counts the time within as that of `what`."""
        begun, self._at = self._now(), what
        try:
            yield
        finally:
            self._spent[what] += self._now() - begun
            self._at = None

    def waited(self, items: Iterator[T], what: str) -> Iterator[T]:
        """`items`, the waiting for each of them counted."""
        while True:
            with self.on(what):
                item = next(items, None)
            if item is None:
                return
            yield item

    @property
    def goodput(self) -> float:
        """The share of training steps, compilation aside, 0 to 1."""
        known = self._total() - self._spent[COMPILING]
        return 1.0 if known <= 0 else max(0.0, known - sum(self._spent.values()) + self._spent[COMPILING]) / known

    def _total(self) -> float:
        return max(self._now() - self._begun, 1e-9)

    def __str__(self) -> str:
        total = self._total()
        known = max(total - self._spent[COMPILING], 1e-9)
        others = [f"{_WORDS[what]} {seconds / known:.1%}" for what, seconds in self._spent.items() if what != COMPILING]
        compiled = f", after {duration(self._spent[COMPILING])} of compiling"
        return f"of {duration(known)} in the loop{compiled}: training steps {self.goodput:.1%}, {', '.join(others)}"
