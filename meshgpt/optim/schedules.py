"""Learning-rate schedules: dataclasses, and what they mean in optax's terms.

One rule for how a run begins, that of GPT-J's and nanoGPT's codes: no step trains at a rate of 0. The first of w steps
of warmup is at peak / w and the last at the peak, and so is the first after it.
"""

import dataclasses
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax

from meshgpt.errors import UserError
from meshgpt.settings import settings


@settings("optim.schedule")
class Cosine:
    """From the peak to `final` x peak along half a cosine over `steps` (None: to the run's last step), then constant.

    lr = peak * (final + (1 - final) * (1 + cos(pi t / steps)) / 2)   (Loshchilov and Hutter 2017, without restarts)
    """

    final: float = 0.1
    """Learning rate at the end of the decay, as a share of the peak."""
    steps: int | None = None
    """Number of steps of the decay, counted from the end of the warmup; None decays to the run's last step."""

    def __post_init__(self) -> None:
        _check_decay(self)


@settings("optim.schedule")
class Linear:
    """From the peak to `final` x peak in a straight line over `steps` (None: to the run's last step), then constant."""

    final: float = 0.0
    """Learning rate at the end of the decay, as a share of the peak."""
    steps: int | None = None
    """Number of steps of the decay, counted from the end of the warmup; None decays to the run's last step."""

    def __post_init__(self) -> None:
        _check_decay(self)


def _check_decay(schedule: Cosine | Linear) -> None:
    if schedule.final < 0 or (schedule.steps is not None and schedule.steps < 1):
        raise UserError(f"{schedule}: give final=0 or more, and at least one step")


@settings("optim.schedule")
class Constant:
    """The peak, for ever."""


@settings("optim.schedule")
class InverseSqrt:
    """peak * sqrt(w / (w + t)), t steps after a warmup of w (at least 1) steps (Vaswani et al. 2017, section 5.3)."""


@settings("optim.schedule.pieces")
class Piece:
    """`steps` on the way to `to` x peak, from wherever the piece before ended ("constant" jumps there at once)."""

    steps: int
    """Number of steps that the piece takes."""
    to: float
    """Learning rate at the piece's end, as a share of the peak."""
    shape: Literal["linear", "cosine", "constant"] = "linear"
    """The way to `to`: `linear`, half a `cosine`, or `constant`, which jumps there at once."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"a schedule's piece of {self.steps} steps: give at least 1")


@settings("optim.schedule")
class Piecewise:
    """One piece after another, the first from `start` x peak; constant after the last.

    A first piece that rises from 0 is a warmup: its first step is one of its `steps` above 0, its last is at `to`.
    Step t (from 0) of any other piece is t / steps of the way, so that a run with a `start` begins at it.
    """

    pieces: tuple[Piece, ...]
    """The pieces, one after another."""
    start: float = 0.0
    """Learning rate before the first piece, as a share of the peak."""

    def __post_init__(self) -> None:
        if not self.pieces:
            raise UserError("a piecewise schedule of no pieces: give at least one")


Schedule: TypeAlias = Cosine | Linear | Constant | InverseSqrt | Piecewise


@dataclasses.dataclass(frozen=True)
class Extension:
    """Steps of a run after those that its schedule was made for.

    Attributes:
        steps: how many; 0 for none.
        kind: "constant" stays at the rate that the schedule ended with. "rewarmed" rises in a straight line from there
            to the peak, in a tenth of the steps, and decays over the others as the schedule did (Ibrahim et al. 2024,
            "Simple and Scalable Strategies to Continually Pre-train Large Language Models").
    """

    steps: int = 0
    kind: Literal["constant", "rewarmed"] = "constant"


def learning_rate_schedule(
    schedule: Schedule, peak: float, warmup_steps: int, total_steps: int, extension: Extension = Extension()
) -> optax.Schedule:
    """The learning rate of a step (0-based): a linear warmup to the peak, then `schedule`; `Piecewise` is all of it.

    A warmup that would not end before the run does is shortened: see `fitting_warmup`.

    Raises:
      UserError: the extension would train at a rate of 0, or a `Piecewise` is to be rewarmed.
    """
    planned = _planned(schedule, peak, fitting_warmup(warmup_steps, total_steps), total_steps)
    if not extension.steps:
        return planned
    # A number also where a step that uses this is being traced; optax relies on the promotion.
    with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
        last = float(jnp.asarray(planned(total_steps)))
    if extension.kind == "constant":
        if last <= 0:
            raise UserError(
                f"extend={extension.steps}: the schedule ends at a learning rate of {last:g}; to go on with one that "
                "rises and falls again, give --extend-schedule rewarmed"
            )
        return optax.join_schedules([planned, optax.constant_schedule(last)], [total_steps])
    if isinstance(schedule, Piecewise):
        raise UserError(
            "extend_schedule=rewarmed: a piecewise schedule has no decay to repeat; add pieces to it instead"
        )
    if isinstance(schedule, Cosine | Linear):
        schedule = dataclasses.replace(schedule, steps=None)
    warmup = max(1, extension.steps // 10)
    rise = optax.linear_schedule(last + (peak - last) / warmup, peak, warmup - 1)
    fall = _after_warmup(schedule, peak, warmup, extension.steps - warmup)
    return optax.join_schedules([planned, rise, fall], [total_steps, total_steps + warmup])


def fitting_warmup(warmup_steps: int, total_steps: int) -> int:
    """`warmup_steps`, or a tenth of the run where so many would not end before it: a short try of a long recipe."""
    return warmup_steps if warmup_steps < total_steps else total_steps // 10


def _planned(schedule: Schedule, peak: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    if isinstance(schedule, Piecewise):
        return _piecewise(schedule, peak)
    after = _after_warmup(schedule, peak, max(warmup_steps, 1), total_steps - warmup_steps)
    if warmup_steps == 0:
        return after
    # The first step already moves: the rate of step t is that of t + 1 steps' worth of warmup.
    warmup = optax.linear_schedule(peak / warmup_steps, peak, warmup_steps - 1)
    return optax.join_schedules([warmup, after], [warmup_steps])


def _after_warmup(schedule: Schedule, peak: float, warmup: int, remaining: int) -> optax.Schedule:
    if isinstance(schedule, Cosine):
        return optax.cosine_decay_schedule(peak, schedule.steps or max(remaining, 1), schedule.final)
    if isinstance(schedule, Linear):
        return optax.linear_schedule(peak, peak * schedule.final, schedule.steps or max(remaining, 1))
    if isinstance(schedule, InverseSqrt):
        return lambda t: peak * jnp.sqrt(warmup / (warmup + jnp.asarray(t, jnp.float32)))
    return optax.constant_schedule(peak)


def _piecewise(schedule: Piecewise, peak: float) -> optax.Schedule:
    parts: list[optax.Schedule] = []
    ends: list[int] = []
    level, end = schedule.start * peak, 0
    for piece in schedule.pieces:
        target = piece.to * peak
        ahead = 1 if not parts and level == 0 < target else 0
        parts.append(_ramp(piece, level, target, ahead))
        level, end = target, end + piece.steps
        ends.append(end)
    return optax.join_schedules([*parts, optax.constant_schedule(level)], ends)


def _ramp(piece: Piece, start: float, stop: float, ahead: int) -> optax.Schedule:
    """From `start` to `stop`; step t is (t + ahead) / steps of the way."""
    if piece.shape == "constant":
        return optax.constant_schedule(stop)
    if piece.shape == "linear":
        line = optax.linear_schedule(start, stop, piece.steps)
        return lambda t: line(t + ahead)

    def cosine(t: jax.typing.ArrayLike) -> jax.Array:
        way = jnp.minimum((t + ahead) / piece.steps, 1.0)
        return stop + (start - stop) * 0.5 * (1.0 + jnp.cos(jnp.pi * way))

    return cosine
