"""A proof by gradient, on a run's own first batch, that no token sees another document.

Legend: as in `layers`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from meshgpt.errors import UserError
from meshgpt.models.decoder import documents_of
from meshgpt.models.model import Model
from meshgpt.trees import Tree

_STRIDE = 7919  # a prime, so that the rows of a batch are looked at in different places


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """What was looked at: rows, and how many of them hold more than one document."""

    rows: int
    shared_rows: int


def prove_isolation(model: Model, params: Tree, tokens_BT: jax.Array, document_end: int) -> Isolation:
    """Differentiates the hidden states of one document in each row with respect to all of the row's inputs.

    Args:
        tokens_BT: input tokens on the mesh that is set.
        document_end: the end-of-text id.

    Raises:
        UserError: the gradient is not exactly zero at the tokens of another document, or is so within its own.
    """
    outside, inside, shared = (np.asarray(value) for value in _reach(model, params, tokens_BT, document_end))
    if not outside == 0.0 or not inside > 0.0:
        raise UserError(
            f"attention does not stay within documents: the gradient of one document is {outside:.3g} in others and "
            f"{inside:.3g} in itself. This is a fault of the attention in use: try --execution.attention xla"
        )
    return Isolation(rows=tokens_BT.shape[0], shared_rows=int(shared))


def _reach(
    model: Model, params: Tree, tokens_BT: jax.Array, document_end: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest gradient outside of the chosen documents, the largest inside, and rows with several documents."""

    @jax.jit
    def reach(params: Tree, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        decoder = model.bind(params)
        segments_BT, _ = documents_of(tokens_BT, document_end)
        length = tokens_BT.shape[1]
        place_B = jnp.arange(tokens_BT.shape[0]) * _STRIDE % length
        here_BT = place_B[:, None] == jnp.arange(length)[None]
        chosen_B = jnp.sum(jnp.where(here_BT, segments_BT, 0), axis=1)
        own_BT = segments_BT == chosen_B[:, None]
        context = decoder.whole(tokens_BT, None, document_end)
        y_BTD, pull = jax.vjp(lambda x_BTD: decoder.through(x_BTD, context), decoder.embed(tokens_BT, context))
        pattern_D = jnp.sin(jnp.arange(y_BTD.shape[-1], dtype=jnp.float32))  # not constant, which a norm would undo
        (gradient_BTD,) = pull(jnp.where(own_BT[:, :, None], pattern_D[None, None], 0.0).astype(y_BTD.dtype))
        size_BT = jnp.abs(gradient_BTD).max(-1).astype(jnp.float32)
        several_B = jnp.any(~own_BT, axis=1)
        return (
            jnp.max(jnp.where(own_BT, 0.0, size_BT)),
            jnp.max(jnp.where(own_BT, size_BT, 0.0)),
            jnp.sum(several_B.astype(jnp.int32)),
        )

    return reach(params, tokens_BT)
