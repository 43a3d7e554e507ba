"""GPT-2 (Radford et al. 2019): learned positions, pre-norm blocks, a head tied to the embedding.

Oracle: `GPT2LMHeadModel` of Hugging Face transformers. Legend: as in `layers`.
"""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal

from meshgpt.distributed.mesh import spec
from meshgpt.errors import UserError
from meshgpt.models.decoder import Decoder, Head, Shape
from meshgpt.models.kv_cache import LayerCache, Slots
from meshgpt.models.layers import MLP, Activation, Attention, Context, Execution, LayerNorm, dropout, param, weight
from meshgpt.settings import ADDED_LATER, settings

INIT_STD = 0.02


@settings("model")
class GPT2Config(Shape):
    """GPT-2's sizes; the defaults are the published 124M model's (124,439,808 parameters)."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_layers: int = 12
    n_heads: int = 12
    d_model: int = 768
    tied_head: bool = True
    """Use the embedding as the head's weight, as the published models do."""
    embd_dropout: float = 0.0
    """Dropout rate of the embeddings in training, in [0, 1) (Hugging Face's `embd_pdrop`, which is 0.1 there)."""
    attn_dropout: float = 0.0
    """Dropout rate of the attention weights in training, in [0, 1) (Hugging Face's `attn_pdrop`, which is 0.1
    there)."""
    resid_dropout: float = 0.0
    """Dropout rate of what attention and MLP add in training, in [0, 1) (Hugging Face's `resid_pdrop`, which is 0.1
    there)."""
    activation: Activation = dataclasses.field(default="gelu_tanh", metadata={ADDED_LATER: True})
    """The MLP's nonlinearity: `gelu_tanh` (GELU by its tanh approximation, as the published models have), `gelu`
    (exact), `relu` or `silu`."""
    inverse_layer_attention: bool = dataclasses.field(default=False, metadata={ADDED_LATER: True})
    """Divide the attention scores of layer i, counted from 1, by i (Hugging Face's `scale_attn_by_inverse_layer_idx`,
    which Stanford CRFM's models have)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("embd_dropout", "attn_dropout", "resid_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"model.{name}={getattr(self, name)}: give a rate in [0, 1)")
        if self.activation not in get_args(Activation):
            raise UserError(f"model.activation={self.activation!r}: give one of {', '.join(get_args(Activation))}")


class Block(nnx.Module):
    """x + attention(ln_1(x)), then x + mlp(ln_2(x)). Projections into the residual start 1/sqrt(2 L) smaller."""

    def __init__(self, config: GPT2Config, execution: Execution, dtype: jnp.dtype, rngs: nnx.Rngs):
        usual, small = normal(INIT_STD), normal(INIT_STD / (2 * config.n_layers) ** 0.5)
        self.rate = config.resid_dropout
        self.ln_1 = LayerNorm(config.d_model, config.layer_norm_eps, dtype)
        self.attn = Attention(
            config.d_model, config.n_heads, usual, small, config.attn_dropout, True, dtype, rngs, execution.attention
        )
        self.ln_2 = LayerNorm(config.d_model, config.layer_norm_eps, dtype)
        self.mlp = MLP(config.d_model, config.mlp_width, usual, small, dtype, rngs, config.activation)

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        a_BTD, cache = self.attn(self.ln_1(x_BTD), context, cache)
        x_BTD = x_BTD + dropout(a_BTD, self.rate, context.split(1))
        return x_BTD + dropout(self.mlp(self.ln_2(x_BTD)), self.rate, context.split(2)), cache


class GPT2(Decoder):
    """The model; see `decoder.Decoder` for what it does and docs/architecture.md for its parameters."""

    def __init__(
        self,
        config: GPT2Config,
        execution: Execution,
        *,
        params_dtype: jnp.dtype = jnp.dtype("float32"),
        compute_dtype: jnp.dtype = jnp.dtype("float32"),
        rngs: nnx.Rngs,
    ):
        self.shape, self.execution, self.dtype = config, execution, compute_dtype
        width, vocab = config.d_model, config.padded_vocab
        self.wte_VD = param(rngs.params(), (vocab, width), "vocab_fsdp embed", normal(INIT_STD), params_dtype)
        self.wpe_SD = param(rngs.params(), (config.n_positions, width), "_ fsdp", normal(INIT_STD), params_dtype)
        self.blocks = jax.vmap(lambda r: Block(config, execution, params_dtype, r))(rngs.split(config.n_layers))
        self.ln_f = LayerNorm(width, config.layer_norm_eps, params_dtype)
        self.tied, self.rate = config.tied_head, config.embd_dropout
        self.numbered = config.inverse_layer_attention
        if not config.tied_head:
            self.head_VD = param(rngs.params(), (vocab, width), "vocab_fsdp embed", normal(INIT_STD), params_dtype)

    def context(self, positions_BT: jax.Array, slots: Slots | None, key: jax.Array | None) -> Context:
        return Context(positions_BT, slots, None, key)

    def embed(self, tokens_BT: jax.Array, context: Context) -> jax.Array:
        rows_SD = weight(self.wpe_SD, jnp.float32)
        shared = context.slots is None and context.segments_BT is None
        out = spec("_ seq embed" if shared else "batch seq embed")
        positions = rows_SD.at[context.positions_BT].get(out_sharding=out).astype(self.dtype)
        return dropout(self.lookup(tokens_BT) + positions, self.rate, context.split(3))

    def head(self) -> Head:
        return Head((self.wte_VD if self.tied else self.head_VD).get_value(), None, self.shape.vocab_size)
