"""What GPT-2 and GPT-J share: tokens in, hidden states out, a cache for generation, and the head.

Legend: as in `layers`; V is the padded vocabulary.
"""

import abc
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from meshgpt.distributed.mesh import spec
from meshgpt.errors import UserError
from meshgpt.models.kv_cache import LayerCache, Slots
from meshgpt.models.layers import Context, Execution, LayerNorm, weight
from meshgpt.models.scan import OfLayer, run_stack, unstack
from meshgpt.settings import settings


@settings("model")
class Shape:
    """The sizes of a decoder."""

    vocab_size: int
    """Number of token ids that the model knows."""
    n_positions: int
    """Longest context, in tokens."""
    n_layers: int
    """Number of blocks."""
    n_heads: int
    """Number of attention heads; must divide d_model."""
    d_model: int
    """Width of the embeddings and of the residual stream."""
    d_ff: int = 0
    """Width of the MLP's hidden layer; 0 takes 4 d_model."""
    layer_norm_eps: float = 1e-5
    """Number added to the variance in each layer norm."""
    vocab_multiple: int = 128
    """Pad the rows of the embedding to a multiple of this, so that any mesh divides them; the padding is masked."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_layers", "n_heads", "d_model", "vocab_multiple"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)}: give a positive number")
        if self.d_ff < 0:
            raise UserError(f"model.d_ff={self.d_ff}: give the MLP's width, or 0 for 4 model.d_model")
        if self.d_model % self.n_heads:
            raise UserError(
                f"model.d_model={self.d_model} is not a multiple of model.n_heads={self.n_heads}; "
                f"for example {self.d_model - self.d_model % self.n_heads + self.n_heads}"
            )

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def mlp_width(self) -> int:
        return self.d_ff or 4 * self.d_model

    @property
    def head_size(self) -> int:
        return self.d_model // self.n_heads


class Head(NamedTuple):
    """What turns hidden states into logits: x w^T + bias. The weight is at rest (float32, `fsdp` not gathered)."""

    weight_VD: jax.Array
    bias_V: jax.Array | None
    vocab_size: int


class Decoder(nnx.Module, abc.ABC):
    """A pre-norm decoder over stacked blocks. A family gives its embedding, its per-pass context, and its head."""

    shape: Shape
    execution: Execution
    dtype: jnp.dtype
    numbered: bool = False  # whether its blocks ask for their layer
    wte_VD: nnx.Param
    blocks: nnx.Module
    ln_f: LayerNorm

    @abc.abstractmethod
    def embed(self, tokens_BT: jax.Array, context: Context) -> jax.Array:
        """Tokens to x_BTD in the compute dtype."""

    @abc.abstractmethod
    def context(self, positions_BT: jax.Array, slots: Slots | None, key: jax.Array | None) -> Context:
        """What all blocks of a pass share."""

    @abc.abstractmethod
    def head(self) -> Head: ...

    def lookup(self, tokens_BT: jax.Array) -> jax.Array:
        """Rows of the embedding, (B, T, D) in the compute dtype.

        Looked up in float32: the gradient of a row is a sum over all its occurrences, which 16 bits would round away.
        """
        table_VD = weight(self.wte_VD, jnp.float32)
        return table_VD.at[tokens_BT].get(out_sharding=spec("batch seq embed")).astype(self.dtype)

    def hidden(self, tokens_BT: jax.Array, key: jax.Array | None = None, document_end: int | None = None) -> jax.Array:
        """Hidden states after the final norm, (B, T, D).

        Args:
            key: turns dropout on.
            document_end: the end-of-text id, where attention and positions are to stop at the ends of documents.
        """
        context = self.make_context(tokens_BT, key, document_end)
        return self.apply_blocks(self.embed(tokens_BT, context), context)

    def make_context(self, tokens_BT: jax.Array, key: jax.Array | None, document_end: int | None) -> Context:
        """The context of whole rows; arguments as in `hidden`."""
        if document_end is None:
            return self.context(jnp.arange(tokens_BT.shape[1])[None], None, key)
        segments_BT, positions_BT = documents_of(tokens_BT, document_end)
        return dataclasses.replace(self.context(positions_BT, None, key), segments_BT=segments_BT)

    def apply_blocks(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        """Embedded tokens through all blocks and the final norm, (B, T, D)."""

        def block(one: nnx.Module, x: jax.Array, of_layer: OfLayer) -> jax.Array:
            return one(x, dataclasses.replace(context, key=of_layer.key, layer=of_layer.number), None)[0]

        layers = self.shape.n_layers
        x_BTD = run_stack(block, self.blocks, x_BTD, context.split(4), layers, self.execution, numbered=self.numbered)
        return self.ln_f(x_BTD)

    def forward_cached(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        slots: Slots,
        caches: tuple[LayerCache, ...],
        blocks: list[nnx.Module],
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        """Hidden states of T more tokens a row, at the positions and in the slots given, and the caches with them.

        `blocks` are the single blocks, `single_blocks(self)`: split once, not on every token.
        """
        context = self.context(positions_BT, slots, None)
        x_BTD = self.embed(tokens_BT, context)
        new = []
        for number, (block, cache) in enumerate(zip(blocks, caches, strict=True)):
            here = dataclasses.replace(context, layer=jnp.int32(number)) if self.numbered else context
            x_BTD, cache = block(x_BTD, here, cache)
            new.append(cache)
        return self.ln_f(x_BTD), tuple(new)

    def empty_caches(self, batch: int, length: int) -> tuple[LayerCache, ...]:
        """One empty cache a layer for `batch` rows of up to `length` tokens."""
        shape = self.shape
        return tuple(
            LayerCache.empty(batch, shape.n_heads, length, shape.head_size, self.dtype) for _ in range(shape.n_layers)
        )

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """(B, T, V) float32 logits of hidden states; the vocabulary's padding is -inf. For a few tokens: the training
        loss never holds this whole (see `loss`)."""
        head = self.head()
        w_VD = jax.sharding.reshard(head.weight_VD.astype(x_BTD.dtype), spec("vocab _"))
        # The weight comes first: XLA's CPU matmul of a few rows takes a quarter less time that way round.
        y_VBT = jnp.einsum(
            "VD,BTD->VBT", w_VD, x_BTD, preferred_element_type=jnp.float32, out_sharding=spec("vocab batch seq")
        )
        y = jnp.moveaxis(y_VBT, 0, -1)
        if head.bias_V is not None:
            y = y + head.bias_V.astype(jnp.float32)[None, None]
        return jnp.where(jnp.arange(y.shape[-1])[None, None] < head.vocab_size, y, -jnp.inf)


def documents_of(tokens_BT: jax.Array, document_end: int) -> tuple[jax.Array, jax.Array]:
    """(document, position in it) of each token of a row, (B, T) int32 each.

    A document begins with the end-of-text token before it, from which its first token is predicted.
    """
    opens_BT = tokens_BT == document_end
    slots_BT = jnp.where(opens_BT, jnp.arange(tokens_BT.shape[1])[None], 0)
    begins_BT = jax.lax.cummax(slots_BT, axis=1)
    return jnp.cumsum(opens_BT.astype(jnp.int32), axis=1), jnp.arange(tokens_BT.shape[1])[None] - begins_BT


def single_blocks(model: Decoder) -> list[nnx.Module]:
    """The blocks of a model one by one, for `Decoder.forward_cached`."""
    return unstack(model.blocks, model.shape.n_layers)
