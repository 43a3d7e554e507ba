"""A model as two pure functions: parameters from a seed, and a decoder from parameters."""

import dataclasses
import functools
from typing import TypeAlias

import jax
from flax import nnx

from meshgpt.decoder import Decoder
from meshgpt.gpt2 import GPT2, GPT2Config
from meshgpt.gptj import GPTJ, GPTJConfig
from meshgpt.layers import Execution
from meshgpt.precision import Precision
from meshgpt.trees import Tree

ModelConfig: TypeAlias = GPT2Config | GPTJConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """An architecture, how it runs and in which precision. All methods need a mesh set (`jax.set_mesh`)."""

    config: ModelConfig
    execution: Execution = Execution()
    precision: Precision = Precision()

    def init(self, key: jax.Array) -> Tree:
        """Fresh parameters: a nested dict of arrays on the mesh (paths and shapes: docs/architecture.md)."""
        return nnx.to_pure_dict(nnx.state(self._build(key), nnx.Param))

    def abstract_params(self) -> Tree:
        """Shapes, dtypes and shardings of the parameters; allocates nothing."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def bind(self, params: Tree) -> Decoder:
        """The decoder that computes with `params`. Inside jit this costs nothing."""
        return nnx.merge(_graph(self, jax.sharding.get_abstract_mesh()), params)

    def _build(self, key: jax.Array) -> Decoder:
        rngs = nnx.Rngs(params=key)
        dtypes = {"params_dtype": self.precision.params_dtype, "compute_dtype": self.precision.compute_dtype}
        if isinstance(self.config, GPTJConfig):
            return GPTJ(self.config, self.execution, rngs=rngs, **dtypes)
        return GPT2(self.config, self.execution, rngs=rngs, **dtypes)


@functools.lru_cache(maxsize=16)
def _graph(model: Model, mesh: jax.sharding.AbstractMesh) -> nnx.GraphDef[Decoder]:
    del mesh  # part of the key: parameters are annotated for the mesh they were traced on
    abstract = jax.eval_shape(lambda: model._build(jax.random.key(0)))
    return nnx.split(abstract, nnx.Param)[0]
