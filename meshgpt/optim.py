"""Optimizers and learning-rate schedules, as optax gradient transformations.

An optimizer here is a direction: the transformation that turns a mean gradient into an update of size one. `step`
clips before it and multiplies by the learning rate of the step after it, so that both are said once, for all.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax

from meshgpt.errors import UserError
from meshgpt.trees import Tree, mask

# Biases, and the scales of norms, are not decayed (every tensor of rank > 1 in the unstacked model is).
DECAYED = r"(?<!_bias)_(?!D$)[A-Z]{2,}$"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """From the peak to `final` x peak along half a cosine over `steps` (None: to the run's last step), then constant.

    lr = peak * (final + (1 - final) * (1 + cos(pi t / steps)) / 2)   (Loshchilov and Hutter 2017, without restarts)
    """

    final: float = 0.1
    steps: int | None = None

    def __post_init__(self) -> None:
        _check_decay(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """From the peak to `final` x peak in a straight line over `steps` (None: to the run's last step), then constant."""

    final: float = 0.0
    steps: int | None = None

    def __post_init__(self) -> None:
        _check_decay(self)


def _check_decay(schedule: Cosine | Linear) -> None:
    if schedule.final < 0 or (schedule.steps is not None and schedule.steps < 1):
        raise UserError(f"{schedule}: give final=0 or more, and at least one step")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """The peak, for ever."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InverseSqrt:
    """peak * sqrt(w / (w + t)), t steps after a warmup of w (at least 1) steps (Vaswani et al. 2017, section 5.3)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """`steps` on the way to `to` x peak, from wherever the piece before ended ("constant" jumps there at once)."""

    steps: int
    to: float
    shape: Literal["linear", "cosine", "constant"] = "linear"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"a schedule's piece of {self.steps} steps: give at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piecewise:
    """One piece after another, the first from `start` x peak; constant after the last."""

    pieces: tuple[Piece, ...]
    start: float = 0.0

    def __post_init__(self) -> None:
        if not self.pieces:
            raise UserError("a piecewise schedule of no pieces: give at least one")


Schedule: TypeAlias = Cosine | Linear | Constant | InverseSqrt | Piecewise


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019).

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  u = m' / (sqrt(v') + eps) + weight_decay * p
    p = p - lr u, with m' and v' corrected for their start at 0; no decay of biases and norms.

    peak_lr, warmup_steps: the learning rate rises linearly from 0 over the warmup, then follows `schedule`.
    clip_norm: gradients are scaled down to this global norm (0: never). moment_dtype: of the first moment.
    """

    peak_lr: float = 6e-4
    warmup_steps: int = 100
    schedule: Schedule = Cosine()
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moment_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        limits = {
            "peak_lr": (self.peak_lr > 0, "above 0"),
            "warmup_steps": (self.warmup_steps >= 0, "0 or more"),
            "b1": (0 <= self.b1 < 1, "in [0, 1)"),
            "b2": (0 <= self.b2 < 1, "in [0, 1)"),
            "eps": (self.eps > 0, "above 0"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "clip_norm": (self.clip_norm >= 0, "0 (never clip) or more"),
        }
        for name, (holds, wanted) in limits.items():
            if not holds:
                raise UserError(f"optim.{name}={getattr(self, name)}: give a number {wanted}")

    def direction(self) -> optax.GradientTransformation:
        """The update's direction, before the learning rate."""
        return optax.chain(
            optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.moment_dtype),
            optax.add_decayed_weights(self.weight_decay, mask=decayed),
        )


Optimizer: TypeAlias = AdamW


def decayed(params: Tree) -> Tree:
    """True for the tensors that weight decay applies to: matrices and embeddings, not biases and norms."""
    return mask(params, DECAYED)


def learning_rate(optim: Optimizer, total_steps: int) -> Callable[[jax.Array], jax.Array]:
    """The learning rate of a step (0-based, an int32 scalar), a float32 scalar.

    Raises:
      UserError: when the warmup does not end before the run does.
    """
    if isinstance(optim.schedule, Piecewise):
        return _piecewise(optim.schedule, optim.peak_lr)
    if optim.warmup_steps >= max(total_steps, 1) and optim.warmup_steps > 0:
        raise UserError(
            f"optim.warmup_steps={optim.warmup_steps} must be below the run's {total_steps} steps; "
            f"for example --optim.warmup-steps {total_steps // 10}"
        )
    after = _after_warmup(optim.schedule, optim.peak_lr, max(optim.warmup_steps, 1), total_steps - optim.warmup_steps)
    if optim.warmup_steps == 0:
        return after
    # The first step already moves: the rate of step t is that of t + 1 steps' worth of warmup.
    warmup = optax.linear_schedule(optim.peak_lr / optim.warmup_steps, optim.peak_lr, optim.warmup_steps - 1)
    return optax.join_schedules([warmup, after], [optim.warmup_steps])


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
        parts.append(_ramp(piece, level, target))
        level, end = target, end + piece.steps
        ends.append(end)
    return optax.join_schedules([*parts, optax.constant_schedule(level)], ends)


def _ramp(piece: Piece, start: float, stop: float) -> optax.Schedule:
    if piece.shape == "constant":
        return optax.constant_schedule(stop)
    if piece.shape == "linear":
        return optax.linear_schedule(start, stop, piece.steps)
    return lambda t: stop + (start - stop) * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.minimum(t / piece.steps, 1.0)))
