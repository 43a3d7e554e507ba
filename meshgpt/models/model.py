"""A model as two pure functions: parameters from a seed, and a decoder from parameters."""

import dataclasses
import functools
import math
from contextlib import nullcontext
from typing import TypeAlias

import jax
from flax import nnx
from jax.sharding import AxisType

from meshgpt.distributed.mesh import AXES, MeshShape
from meshgpt.errors import UserError
from meshgpt.models.decoder import Decoder
from meshgpt.models.gpt2 import GPT2, GPT2Config
from meshgpt.models.gptj import GPTJ, GPTJConfig
from meshgpt.models.layers import Execution
from meshgpt.models.precision import Precision
from meshgpt.trees import Tree, leaves_with_names

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
        return jax.eval_shape(lambda: self.init(jax.random.key(0)))

    def bind(self, params: Tree) -> Decoder:
        """The decoder that computes with `params`. Inside jit this costs nothing."""
        return nnx.merge(_graph(self, jax.sharding.get_abstract_mesh()), params)

    def _build(self, key: jax.Array) -> Decoder:
        rngs = nnx.Rngs(params=key)
        dtypes = {"params_dtype": self.precision.params_dtype, "compute_dtype": self.precision.compute_dtype}
        if isinstance(self.config, GPTJConfig):
            return GPTJ(self.config, self.execution, rngs=rngs, **dtypes)
        return GPT2(self.config, self.execution, rngs=rngs, **dtypes)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a model's parameters, for `scaling`; needs no mesh and no memory of a device."""
    model = Model(config=config, precision=Precision(compute="float32"))
    one = jax.sharding.AbstractMesh((1,) * len(AXES), AXES, (AxisType.Explicit,) * len(AXES))
    set_already = not jax.sharding.get_abstract_mesh().empty
    with nullcontext() if set_already else jax.sharding.use_abstract_mesh(one):
        params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    return {name: leaf.shape for name, leaf in leaves_with_names(params)}


@functools.lru_cache(maxsize=16)
def _graph(model: Model, mesh: jax.sharding.AbstractMesh) -> nnx.GraphDef[Decoder]:
    del mesh  # part of the key: parameters are annotated for the mesh they were traced on
    abstract = jax.eval_shape(lambda: model._build(jax.random.key(0)))
    return nnx.split(abstract, nnx.Param)[0]


def check_divisibility(config: ModelConfig, mesh: MeshShape, global_batch: int, accumulate: int) -> None:
    """Whether every tensor of the model, and every microbatch, can be cut along the mesh (a resolved shape).

    Raises:
      UserError: naming the number that the mesh does not divide, and one that works.
    """
    for name, value in (("global_batch", global_batch), ("accumulate", accumulate)):
        if value < 1:
            raise UserError(f"{name}={value}: give at least 1")
    if config.n_heads % mesh.tensor:
        fits = math.gcd(config.n_heads, mesh.tensor)
        raise _indivisible(f"model.n_heads={config.n_heads}", f"mesh.tensor={mesh.tensor}", f"--mesh.tensor {fits}")
    if config.mlp_width % mesh.tensor:
        fits = _next_multiple(config.mlp_width, mesh.tensor)
        raise _indivisible(f"model.d_ff={config.mlp_width}", f"mesh.tensor={mesh.tensor}", f"--model.d-ff {fits}")
    if config.d_model % mesh.fsdp:
        fits = max(n for n in range(1, mesh.fsdp) if config.d_model % n == 0)
        raise _indivisible(f"model.d_model={config.d_model}", f"mesh.fsdp={mesh.fsdp}", f"--mesh.fsdp {fits}")
    slices = mesh.fsdp * mesh.tensor
    if config.padded_vocab % slices:
        number = f"the vocabulary of {config.vocab_size}, padded to {config.padded_vocab} (model.vocab_multiple)"
        fits = math.lcm(config.vocab_multiple, slices)
        raise _indivisible(number, f"mesh.fsdp x mesh.tensor = {slices}", f"--model.vocab-multiple {fits}")
    parts = mesh.batch_shards * accumulate
    if global_batch % parts:
        what = f"mesh.data x mesh.fsdp x accumulate = {parts}"
        raise _indivisible(
            f"global_batch={global_batch}", what, f"--global-batch {_next_multiple(global_batch, parts)}"
        )


def _next_multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _indivisible(number: str, by: str, remedy: str) -> UserError:
    return UserError(f"{number} is not a multiple of {by}; for example {remedy}")
