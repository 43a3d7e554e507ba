"""A proof by gradient, on a run's own first batch, that no token sees another document.

Every pair of documents of every row is looked at. A row's documents have numbers; for each binary digit of these, the
hidden states of all documents whose digit is 1 are differentiated with respect to the inputs of those whose digit is 0,
and the other way round. Two documents differ in some digit, so each is asked about each other one, in 2 log2(n) passes.

Legend: as in `layers`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from meshgpt.errors import UserError
from meshgpt.models.decoder import documents_of
from meshgpt.models.model import Model
from meshgpt.trees import Tree

_NONE = -1.0  # in the place of a gradient's size


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """What was looked at: rows, how many of them hold more than one document, and the documents of all rows."""

    rows: int
    shared_rows: int
    documents: int

    def __add__(self, other: "Isolation") -> "Isolation":
        return Isolation(
            rows=self.rows + other.rows,
            shared_rows=self.shared_rows + other.shared_rows,
            documents=self.documents + other.documents,
        )


def prove_isolation(model: Model, params: Tree, tokens_BT: jax.Array, document_end: int) -> Isolation:
    """Differentiates the hidden states of every document of each row with respect to the inputs of every other one.

    Args:
        tokens_BT: input tokens on the mesh that is set.
        document_end: the end-of-text id.

    Raises:
        UserError: a gradient is not exactly zero at the tokens of another document, or is so within its own.
    """
    return isolation_prover(model, document_end)(params, tokens_BT)


def isolation_prover(model: Model, document_end: int) -> Callable[[Tree, jax.Array], Isolation]:
    """`prove_isolation` as a function of parameters and tokens that is compiled once for several microbatches."""
    documents = jax.jit(functools.partial(_documents, document_end))
    reach = jax.jit(functools.partial(_reach, model, document_end))

    def prove(params: Tree, tokens_BT: jax.Array) -> Isolation:
        most, shared, count = (int(value) for value in documents(tokens_BT))
        for digit in range(max(1, most.bit_length())):
            for value in (0, 1):
                outside, inside = (float(size) for size in reach(params, tokens_BT, digit, value))
                if not outside == 0.0 or not (inside > 0.0 or inside == _NONE):
                    raise UserError(
                        f"attention does not stay within documents: the gradient of a document is {outside:.3g} in "
                        f"others and {inside:.3g} in itself. This is a fault of the attention in use: try "
                        "--execution.attention xla"
                    )
        return Isolation(rows=tokens_BT.shape[0], shared_rows=shared, documents=count)

    return prove


def _documents(document_end: int, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(the highest number of a document, rows with several documents, documents of all rows)."""
    segments_BT, _ = documents_of(tokens_BT, document_end)
    first_B, last_B = segments_BT[:, 0], segments_BT[:, -1]
    several_B = (last_B > first_B).astype(jnp.int32)
    return jnp.max(last_B), jnp.sum(several_B), jnp.sum(last_B - first_B + 1)


def _reach(
    model: Model, document_end: int, params: Tree, tokens_BT: jax.Array, digit: int, value: int
) -> tuple[jax.Array, jax.Array]:
    """The largest gradient of the documents whose number has this value of a digit, in all others and in themselves.

    The second is `_NONE` where no document has it.
    """
    decoder = model.bind(params)
    segments_BT, _ = documents_of(tokens_BT, document_end)
    own_BT = (segments_BT >> digit) & 1 == value
    context = decoder.make_context(tokens_BT, None, document_end)
    y_BTD, pull = jax.vjp(lambda x_BTD: decoder.apply_blocks(x_BTD, context), decoder.embed(tokens_BT, context))
    # Not constant over the width, which a norm would undo, nor over positions, whose parts could cancel.
    places_TD = jnp.arange(y_BTD.shape[1], dtype=jnp.float32)[:, None] + 1
    pattern_TD = jnp.sin(places_TD * (1 + jnp.arange(y_BTD.shape[-1], dtype=jnp.float32))[None])
    (gradient_BTD,) = pull(jnp.where(own_BT[:, :, None], pattern_TD[None], 0.0).astype(y_BTD.dtype))
    size_BT = jnp.abs(gradient_BTD).max(-1).astype(jnp.float32)
    inside = jnp.max(jnp.where(own_BT, size_BT, 0.0))
    return jnp.max(jnp.where(own_BT, 0.0, size_BT)), jnp.where(jnp.any(own_BT), inside, _NONE)
