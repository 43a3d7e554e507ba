"""Which dtype holds parameters and which one computes."""

import dataclasses
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

Float: TypeAlias = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """The dtype policy of a run.

    `params` is how parameters and gradients are kept, `compute` what activations and matmuls use; norms, softmax and
    the loss are always float32. `compute="auto"` is bfloat16 on accelerators and float32 on CPU.
    """

    params: Float = "float32"
    compute: Float | Literal["auto"] = "auto"

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
