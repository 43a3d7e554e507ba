"""Where the wall time of a training loop goes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from meshgpt.pulse import EVALUATING, SAVING
from meshgpt.tracker import duration

DATA, COMPILING = "data", "compiling"
_WORDS = {
    DATA: "waiting for data",
    COMPILING: "compiling",
    EVALUATING: "evaluating",
    SAVING: "saving",
}
T = TypeVar("T")


class Clock:
    """Seconds by what the loop was at. What is left is training steps: goodput is their share.

    Steps run on the devices while the loop does other things, so that the share of steps is a lower bound.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._begun = now, now()
        self._spent = dict.fromkeys(_WORDS, 0.0)

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Counts the time within as that of `what`."""
        begun = self._now()
        try:
            yield
        finally:
            self._spent[what] += self._now() - begun

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
