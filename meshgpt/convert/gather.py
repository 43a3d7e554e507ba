"""The parameters on the devices, as the tensors that a Hugging Face file holds, fetched one at a time."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from meshgpt import trees
from meshgpt.convert.hf_names import ModelConfig, Stored, stored_tensors, to_stored
from meshgpt.errors import UserError


def live_tensors(
    params: trees.Tree, config: ModelConfig, dtype: np.dtype, order: Sequence[Stored] = ()
) -> Iterator[tuple[Stored, np.ndarray]]:
    """Every stored tensor of the model with its contents in `dtype`; one layer's slice is on the host at a time.

    `order` are the tensors to go through, by default all of them in the order of the model.

    Every process of a run has to go through it, for parameters that span processes are gathered here.

    Raises:
      UserError: naming the tensor that holds, or in `dtype` would hold, a value that is not finite.
    """
    leaves = dict(trees.leaves_with_names(params))
    for tensor in order or stored_tensors(config):
        parts = [fetch(leaves[path], tensor.layer) for path in tensor.paths]
        contents = to_stored(tensor, parts)
        del parts
        with np.errstate(over="ignore"):  # told below, by name
            cast = contents.astype(dtype, copy=False)
        if not np.isfinite(cast).all():
            raise UserError(_not_finite(tensor, contents, dtype))
        yield tensor, cast


def _not_finite(tensor: Stored, contents: np.ndarray, dtype: np.dtype) -> str:
    if not np.isfinite(contents).all():
        return f"{tensor.name} holds a value that is not finite: this model cannot be exported; use an earlier step"
    largest = float(np.abs(contents).max())
    return f"{tensor.name} reaches {largest:.4g}, which overflows {dtype.name}: export as bfloat16 or float32 instead"


def fetch(leaf: jax.Array, layer: int | None) -> np.ndarray:
    """A parameter, or one layer of a stacked one, on the host of every process."""
    part = leaf if layer is None else _layer(leaf, layer)
    if part.is_fully_addressable:
        return np.asarray(part)
    return np.asarray(multihost_utils.process_allgather(part, tiled=True))


@jax.jit
def _layer(stack: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)
