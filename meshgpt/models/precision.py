"""Which dtype holds parameters and which one computes; the scale that keeps float16 gradients in range."""

import dataclasses
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from meshgpt.errors import UserError
from meshgpt.settings import settings

Float: TypeAlias = Literal["float32", "bfloat16"]

_CEILING = 2.0**24


@settings("precision.loss_scaling")
class LossScaling:
    """Dynamic loss scaling, for float16 only (Micikevicius et al. 2018, section 3.2).

    The loss of a microbatch, a mean, is multiplied by the scale before its gradient is taken, and the gradient divided
    by it. A step that overflows is skipped and halves the scale; `growth_interval` good steps in a row double it. A run
    that overflows with the scale at `floor` is stopped.
    """

    initial: float = 2.0**15
    """Loss scale of the first step; at most 2^24."""
    growth_interval: int = 2000
    """Number of good steps in a row that double the scale."""
    floor: float = 1.0
    """Smallest scale; a run that overflows with it is stopped."""

    def __post_init__(self) -> None:
        if self.growth_interval < 1 or not 0 < self.floor <= self.initial <= _CEILING:
            raise UserError(f"precision.{self}: give 0 < floor <= initial <= 2^24, and a growth_interval of 1 or more")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
    """value: the scale, float32. good_steps: finite ones since it last changed."""

    value: jax.Array
    good_steps: jax.Array

    @staticmethod
    def fresh(scaling: LossScaling) -> "LossScale":
        return LossScale(jnp.float32(scaling.initial), jnp.int32(0))

    def after(self, finite: jax.Array, scaling: LossScaling) -> "LossScale":
        """The scale for the next step."""
        grows = self.good_steps + 1 >= scaling.growth_interval
        up = jnp.where(grows, jnp.minimum(self.value * 2, _CEILING), self.value)
        value = jnp.where(finite, up, jnp.maximum(self.value / 2, scaling.floor))
        return LossScale(value, jnp.where(finite & ~grows, self.good_steps + 1, 0))


@settings("precision")
class Precision:
    """The dtype policy of a run."""

    params: Float = "float32"
    """Dtype that parameters and gradients are kept in."""
    compute: Float | Literal["float16", "auto"] = "auto"
    """Dtype of activations and matmuls; `auto` is bfloat16 on accelerators and float32 on CPU, and float16 is for GPUs
    without bfloat16. Norms, softmax and the loss are always float32."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How an updated parameter becomes bfloat16: `nearest` loses updates below a 512th of it, `stochastic` rounds up as
    often as keeps them on average."""
    loss_scaling: LossScaling = LossScaling()
    """Dynamic loss scaling, which float16 uses."""

    def __post_init__(self) -> None:
        if self.rounding == "stochastic" and self.params == "float32":
            raise UserError(
                "precision.rounding=stochastic is for parameters in 16 bits: give --precision.params bfloat16"
            )

    def resolve(self, platform: str) -> "Precision":
        """The same policy with "auto" replaced for `platform` ("cpu", "gpu", "tpu")."""
        if self.compute != "auto":
            return self
        return dataclasses.replace(self, compute="float32" if platform == "cpu" else "bfloat16")

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.resolve(jax.default_backend()).compute)

    @property
    def params_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.params)

    @property
    def scales_loss(self) -> bool:
        return self.compute == "float16"


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to bfloat16, up or down with the probability that keeps the mean. The same on every mesh."""
    noise = jax.random.bits(key, x.shape, jnp.uint16, out_sharding=jax.typeof(x).sharding).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    kept = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), kept, x).astype(jnp.bfloat16)
