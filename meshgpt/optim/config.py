"""Optimizers, as optax gradient transformations, each a dataclass that a recipe's `optim` may be.

An optimizer here is a transformation, which turns a mean gradient into an update of size one. `step`
clips before it and multiplies by the learning rate of the step after it, so that both are said once, for all. Its
`update` takes `finite`, a scalar: where it is False the state stays as it was.
"""

import abc
import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, Literal, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from meshgpt.distributed import host_memory
from meshgpt.errors import UserError
from meshgpt.optim import codecs
from meshgpt.optim.adafactor import Adafactor as FactoredMoment
from meshgpt.optim.adam import Adam
from meshgpt.optim.moments import Blocks, Format, Plain, RowsAndColumns
from meshgpt.optim.muon import OrthogonalMomentum
from meshgpt.optim.schedules import (
    Constant,
    Cosine,
    Extension,
    InverseSqrt,
    Linear,
    Piece,
    Piecewise,
    Schedule,
    learning_rate_schedule,
)
from meshgpt.settings import INSTEAD, settings
from meshgpt.trees import MATRIX, Tree, map_with_names, mask

# A recipe takes optimizers and their schedules from here.
__all__ = [
    "Adafactor", "AdamW", "AdamW4bit", "AdamW8bit", "Common", "Constant", "Cosine", "InverseSqrt", "Linear", "Lion",
    "Muon", "Optimizer", "Piece", "Piecewise", "Schedule", "decayed", "learning_rate",
]  # fmt: skip

FloatName: TypeAlias = Literal["float32", "bfloat16"]
Memory: TypeAlias = Literal["device", "pinned_host"]

# (what holds for the number as float32 has it, said in words), by field. The step computes in float32, where 1e-50 is
# 0, 0.99999999 is 1 and 1e300 is infinite; what lies below its normal numbers, some devices take for 0.
_TINY = float(np.finfo(np.float32).tiny)
_LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    "peak_lr": (lambda x: _TINY <= x < np.inf, "above 0 that float32 can hold"),
    "warmup_steps": (lambda x: x >= 0, "0 or more"),
    "clip_norm": (lambda x: 0 <= x < np.inf, "0 (never clip) or more"),
    "weight_decay": (lambda x: 0 <= x < np.inf, "0 or more"),
    "b1": (lambda x: 0 <= x < 1, "in [0, 1), in float32"),
    "b2": (lambda x: 0 <= x < 1, "in [0, 1), in float32"),
    "beta": (lambda x: 0 <= x < 1, "in [0, 1), in float32"),
    "eps": (lambda x: _TINY <= x < np.inf, "above 0, in float32 (1.2e-38 or more)"),
    "decay": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "clip_rms": (lambda x: _TINY <= x < np.inf, "above 0"),
}


def _in_float32(value: float) -> float:
    with np.errstate(over="ignore", under="ignore"):
        return float(np.float32(value))


@settings("optim")
class Common(abc.ABC):
    """What every optimizer has."""

    peak_lr: float = 6e-4
    """Highest learning rate, reached at the end of the warmup."""
    warmup_steps: int = 100
    """Number of steps over which the learning rate rises linearly from 0 to its peak."""
    schedule: Schedule = Cosine()
    """How the learning rate goes on after the warmup."""
    clip_norm: float = dataclasses.field(default=1.0, metadata={INSTEAD: "; 0 never clips"})
    """Scale gradients down to this global norm where theirs is larger; 0 never does."""
    weight_decay: float = 0.1
    """Decoupled weight decay (Loshchilov and Hutter 2019) of matrices and embeddings, not of biases and norms: p -= lr
    weight_decay p."""
    state_memory: Memory = "device"
    """Where the optimizer's state rests between steps; `pinned_host` pages it to the accelerator and back, for two
    transfers of the state a step: AdamW's parameter by parameter, the others' at once after the gradients."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            holds, wanted = _LIMITS.get(field.name, (None, ""))
            value = getattr(self, field.name)
            if holds is not None and not holds(_in_float32(value)):
                raise UserError(f"optim.{field.name}={value}: give a number {wanted}")

    @abc.abstractmethod
    def transformation(self) -> optax.GradientTransformationExtraArgs:
        """Gradients to updates, before the learning rate."""


@settings("optim")
class AdamW(Common):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019).

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  u = m' / (sqrt(v') + eps) + weight_decay * p
    p = p - lr u, with m' and v' corrected for their start at 0; no decay of biases and norms.
    """

    b1: float = 0.9
    """Decay rate of the first moment."""
    b2: float = 0.95
    """Decay rate of the second moment."""
    eps: float = 1e-8
    """Number added to the root of the second moment."""
    moment_dtype: FloatName = "float32"
    """Dtype of the first moment; with bfloat16, b1 is at most 0.99, as smaller changes would be lost."""
    second_moment_dtype: FloatName = "float32"
    """Dtype of the second moment; with bfloat16, b2 is at most 0.99, as smaller changes would be lost."""

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        _check_memory("moment_dtype", self.moment_dtype, "b1", self.b1)
        _check_memory("second_moment_dtype", self.second_moment_dtype, "b2", self.b2)
        return _adamw(self)

    @property
    def formats(self) -> tuple[Format, Format]:
        """Of the first and the second moment."""
        return Plain(self.moment_dtype), Plain(self.second_moment_dtype)


@settings("optim")
class AdamW8bit(Common):
    """AdamW whose moments take 8 bits each: dynamic exponents, a scale a block of 256 (Dettmers et al. 2022).

    No second moment is rounded to 0, as the paper's are: such an update would be hundreds of times too large.
    """

    b1: float = 0.9
    """Decay rate of the first moment."""
    b2: float = 0.95
    """Decay rate of the second moment."""
    eps: float = 1e-8
    """Number added to the root of the second moment."""

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        return _adamw(self)

    @property
    def formats(self) -> tuple[Format, Format]:
        """Of the first and the second moment."""
        return Blocks(codecs.DYNAMIC_8, 256), Blocks(codecs.DYNAMIC_8_UNSIGNED, 256)


@settings("optim")
class AdamW4bit(Common):
    """AdamW whose moments take 4 bits each (Li, Chen and Zhu 2023, "4-bit AdamW").

    The first: dynamic exponents, a scale a block of 128. The second: linear without zero, scaled by row and column.
    """

    b1: float = 0.9
    """Decay rate of the first moment."""
    b2: float = 0.95
    """Decay rate of the second moment."""
    eps: float = 1e-8
    """Number added to the root of the second moment."""

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        return _adamw(self)

    @property
    def formats(self) -> tuple[Format, Format]:
        """Of the first and the second moment."""
        return Blocks(codecs.DYNAMIC_4, 128), RowsAndColumns(codecs.LINEAR_4)


@settings("optim")
class Adafactor(Common):
    """No first moment, and the second as means over rows and columns (Shazeer and Stern 2018)."""

    decay: float = 0.8
    """Exponent of the second moment's decay rate, which is 1 - t^-decay at step t."""
    eps: float = 1e-30
    """Number added to the squared gradient."""
    clip_rms: float = 1.0
    """Largest root mean square of an update."""

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        moment = FactoredMoment(decay=self.decay, eps=self.eps, clip=self.clip_rms)
        return _with_decay(self, moment.transformation())


@settings("optim")
class Lion(Common):
    """The sign of a momentum (Chen et al. 2023, algorithm 2); wants a third to a tenth of AdamW's peak_lr.

    u = sign(b1 m + (1 - b1) g) + weight_decay * p;  m = b2 m + (1 - b2) g
    """

    peak_lr: float = 1e-4
    """Highest learning rate, reached at the end of the warmup; a third to a tenth of AdamW's."""
    weight_decay: float = 0.5
    """Decoupled weight decay of matrices and embeddings, not of biases and norms: p -= lr weight_decay p."""
    b1: float = 0.9
    """Share of the momentum in the update's direction."""
    b2: float = 0.99
    """Decay rate of the momentum."""
    moment_dtype: FloatName = "float32"
    """Dtype of the momentum; with bfloat16, b2 is at most 0.99, as smaller changes would be lost."""

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        _check_memory("moment_dtype", self.moment_dtype, "b2", self.b2)
        return _with_decay(self, _held(optax.scale_by_lion(self.b1, self.b2, mu_dtype=jnp.dtype(self.moment_dtype))))


@settings("optim")
class Muon(Common):
    """Orthogonal momentum for the blocks' matrices, AdamW for embeddings, head and vectors (Jordan et al. 2024).

    Both take one learning rate: Muon's update is made as large as Adam's (Liu et al. 2025). A block's matrix is
    gathered for it, and every device computes the same.
    """

    beta: float = 0.95
    """Decay rate of Muon's momentum."""
    b1: float = 0.9
    """Decay rate of AdamW's first moment."""
    b2: float = 0.95
    """Decay rate of AdamW's second moment."""
    eps: float = 1e-8
    """Number added to the root of AdamW's second moment."""

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        adam = Adam(self.b1, self.b2, self.eps, Plain("float32"), Plain("float32")).transformation()
        parts: dict[Hashable, optax.GradientTransformation] = {
            "muon": OrthogonalMomentum(self.beta).transformation(),
            "adam": adam,
        }
        return _with_decay(self, optax.partition(parts, _muon_or_adam))


Optimizer: TypeAlias = AdamW | AdamW8bit | AdamW4bit | Adafactor | Lion | Muon


def decayed(params: Tree) -> Tree:
    """True for the tensors that weight decay applies to: matrices and embeddings, not biases and norms."""
    return mask(params, MATRIX)


def learning_rate(optim: Optimizer, total_steps: int, extension: Extension = Extension()) -> optax.Schedule:
    """The learning rate of a step (0-based, an int32 scalar), a float32 scalar.

    Args:
      total_steps: those that the schedule is made for; the steps of `extension` come after them.

    Raises:
      UserError: an extension that cannot be.
    """
    return learning_rate_schedule(optim.schedule, optim.peak_lr, optim.warmup_steps, total_steps, extension)


def _check_memory(field: str, dtype: FloatName, decay: str, value: float) -> None:
    """Raises UserError for a mean in bfloat16 that changes by less than its rounding."""
    if dtype == "bfloat16" and value > 0.99:
        raise UserError(
            f"optim.{field}=bfloat16 keeps 8 bits, which lose steps of 1 - {decay} = {1 - value:.2g}: "
            f"give --optim.{decay} 0.99 or lower, or keep it in float32"
        )


def _adamw(optim: "AdamW | AdamW8bit | AdamW4bit") -> optax.GradientTransformationExtraArgs:
    paged = optim.state_memory != "device"
    if paged:
        _require_host_memory()
        if not all(isinstance(kept, Plain) for kept in optim.formats):
            host_memory.refuse_bytes_on_tpu("optim.state_memory=pinned_host")
    adam = Adam(optim.b1, optim.b2, optim.eps, *optim.formats, paged)
    return _decaying(optim, adam.transformation())


def _with_decay(optim: Common, transformation: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    return _decaying(optim, transformation if optim.state_memory == "device" else _paged(transformation))


def _decaying(optim: Common, transformation: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    return optax.with_extra_args_support(
        optax.chain(transformation, optax.add_decayed_weights(optim.weight_decay, mask=decayed))
    )


def resting(optim: Common, opt_state: Tree) -> Tree:
    """Abstract optimizer state with the memory it rests in."""
    return opt_state if optim.state_memory == "device" else host_memory.on_host(opt_state)


def _paged(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner`, whose state rests in the host's memory and comes to the device whole, when the gradients are there."""
    _require_host_memory()

    def update(updates: Tree, state: Tree, params: Tree | None = None, *, finite: jax.Array) -> tuple[Tree, Tree]:
        # Without the barrier XLA would fetch as the step begins, and the state would be beside the activations.
        updates, state = jax.lax.optimization_barrier((updates, state))
        fetched = host_memory.to_device(state)
        updates, new = optax.with_extra_args_support(inner).update(updates, fetched, params, finite=finite)
        return updates, host_memory.to_host(new)

    def init(params: Tree) -> Tree:
        return host_memory.to_host(inner.init(params))

    return optax.GradientTransformationExtraArgs(init, cast(Any, update))


def _require_host_memory() -> None:
    remedy = "leave the state on the device, and take an optimizer with less of it (AdamW8bit, AdamW4bit, Adafactor)"
    host_memory.require("optim.state_memory=pinned_host", remedy)


def _held(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner`, whose state stays as it was where `finite` is False."""

    def update(updates: Tree, state: Tree, params: Tree | None = None, *, finite: jax.Array) -> tuple[Tree, Tree]:
        updates, new = inner.update(updates, state, params)
        return updates, jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)

    return optax.GradientTransformationExtraArgs(inner.init, cast(Any, update))


def _muon_or_adam(params: Tree) -> Tree:
    matrices = mask(params, rf"^blocks/.*{MATRIX}")
    return map_with_names(lambda _, is_matrix: "muon" if is_matrix else "adam", matrices)
