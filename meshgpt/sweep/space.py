"""What a sweep tries: axes of values, and points chosen among them."""

import itertools
import math
import random
import re
from collections.abc import Sequence

from meshgpt.errors import UserError
from meshgpt.settings import settings

_RANGE = re.compile(r"([^:]+):([^:]+):(log|lin):(\d+)")
_MOST = 10_000


@settings()
class Axis:
    """One flag and the values it takes. low, high, scale: of a range, which random search draws from in between."""

    flag: str
    values: tuple[str, ...]
    low: float | None = None
    high: float | None = None
    scale: str = ""

    def draw(self, rng: random.Random) -> str:
        """A value at random: of a range any number in it, on its scale; else one of the values."""
        if self.low is None or self.high is None:
            return rng.choice(self.values)
        if self.scale == "log":
            return _number(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return _number(rng.uniform(self.low, self.high))


# (flag, value) of every axis.
Point = tuple[tuple[str, str], ...]


def split(flags: Sequence[str]) -> tuple[tuple[Axis, ...], tuple[str, ...]]:
    """The axes among a recipe's flags, and the flags that stay.

    Raises:
      UserError: a range that is none, or a value that is there twice.
    """
    axes: list[Axis] = []
    fixed: list[str] = []
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        name, equals, value = flag.partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            name, value = flag, rest[0]
        axis = _axis(name, value) if name.startswith("--") and value else None
        if axis is None:
            fixed.append(flag)
            continue
        axes.append(axis)
        if not equals:
            rest.pop(0)
    names = [axis.flag for axis in axes]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{twice} is swept twice: give it once")
    return tuple(axes), tuple(fixed)


def _axis(flag: str, text: str) -> Axis | None:
    """None for a single value, as a text with spaces is."""
    if ":" in text and (found := _RANGE.fullmatch(text)):
        return _range(flag, text, *found.groups())
    if "," not in text or " " in text:
        return None
    values = tuple(text.split(","))
    if not all(values) or len(set(values)) < len(values):
        raise UserError(f"{flag} {text}: give different values with commas between them")
    return Axis(flag=flag, values=values)


def _range(flag: str, text: str, first: str, last: str, scale: str, count: str) -> Axis:
    example = f"{flag} {text}: give LOW:HIGH:log:N or LOW:HIGH:lin:N, such as 1e-4:1e-2:log:5"
    try:
        low, high, number = float(first), float(last), int(count)
    except ValueError as error:
        raise UserError(example) from error
    if not (math.isfinite(low) and low < high < math.inf) or number < 2 or (scale == "log" and low <= 0):
        raise UserError(example)
    steps = [k / (number - 1) for k in range(number)]
    if scale == "log":
        values = [low * (high / low) ** step for step in steps]
    else:
        values = [low + (high - low) * step for step in steps]
    return Axis(flag=flag, values=tuple(map(_number, values)), low=low, high=high, scale=scale)


def _number(value: float) -> str:
    return f"{value:.6g}"


def grid(axes: Sequence[Axis]) -> list[Point]:
    """Every combination, the last axis fastest."""
    if math.prod(len(axis.values) for axis in axes) > _MOST:
        raise UserError(f"the grid has more than {_MOST:,} points: give fewer values, or --method random --trials N")
    return [
        tuple(zip((axis.flag for axis in axes), values, strict=True))
        for values in itertools.product(*(axis.values for axis in axes))
    ]


def at_random(axes: Sequence[Axis], count: int, seed: int) -> list[Point]:
    """So many points, each flag drawn for itself; a function of the seed."""
    rng = random.Random(seed)
    return [tuple((axis.flag, axis.draw(rng)) for axis in axes) for _ in range(count)]
