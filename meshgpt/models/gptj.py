"""GPT-J (Wang and Komatsuzaki 2021): rotary positions, attention and MLP in parallel, an untied head with a bias.

Oracle: `GPTJForCausalLM` of Hugging Face transformers (PyTorch; two stored revisions of its Flax model turn the wrong
way). Initialisation as in Mesh-Transformer-JAX: normal deviates cut off at twice the stated scale.

Legend: as in `layers`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import truncated_normal, zeros

from meshgpt.errors import UserError
from meshgpt.models.decoder import Decoder, Head, Shape
from meshgpt.models.kv_cache import LayerCache, Slots
from meshgpt.models.layers import MLP, Attention, Context, Execution, LayerNorm, param, rotary_table
from meshgpt.settings import ADDED_LATER, settings


@settings("model")
class GPTJConfig(Shape):
    """GPT-J's sizes; the defaults are the published 6B model's (6,050,882,784 parameters)."""

    vocab_size: int = 50400
    """Number of token ids that the model knows; the published model has 50,400, of which its tokenizer uses 50,257."""
    n_positions: int = 2048
    n_layers: int = 28
    n_heads: int = 16
    d_model: int = 4096
    rotary_dim: int = 64
    """Number of dimensions of each head that the rotary position embedding turns; even, and at most the head size."""
    tied_head: bool = dataclasses.field(default=False, metadata={ADDED_LATER: True})
    """Use the embedding as the head's weight; the published model does not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_size:
            raise UserError(
                f"model.rotary_dim={self.rotary_dim}: give an even number up to the head size, "
                f"d_model / n_heads = {self.head_size}"
            )


class Block(nnx.Module):
    """x + attention(ln(x)) + mlp(ln(x)), with one norm."""

    def __init__(self, config: GPTJConfig, execution: Execution, dtype: jnp.dtype, rngs: nnx.Rngs):
        fan_in = config.d_model**-0.5
        usual, small = truncated_normal(fan_in), truncated_normal(2.0 / config.n_layers * fan_in)
        self.ln_1 = LayerNorm(config.d_model, config.layer_norm_eps, dtype)
        self.attn = Attention(
            config.d_model, config.n_heads, usual, small, 0.0, False, dtype, rngs, execution.attention
        )
        self.mlp = MLP(config.d_model, config.mlp_width, usual, small, dtype, rngs)

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        h_BTD = self.ln_1(x_BTD)
        a_BTD, cache = self.attn(h_BTD, context, cache)
        return x_BTD + a_BTD + self.mlp(h_BTD), cache


class GPTJ(Decoder):
    """The model; see `decoder.Decoder` for what it does and docs/architecture.md for its parameters."""

    def __init__(
        self,
        config: GPTJConfig,
        execution: Execution,
        *,
        params_dtype: jnp.dtype = jnp.dtype("float32"),
        compute_dtype: jnp.dtype = jnp.dtype("float32"),
        rngs: nnx.Rngs,
    ):
        self.shape, self.execution, self.dtype = config, execution, compute_dtype
        self.rotary_dim = config.rotary_dim
        width, vocab = config.d_model, config.padded_vocab
        embedding, head = truncated_normal(config.vocab_size**-0.5), truncated_normal(width**-0.5)
        self.wte_VD = param(rngs.params(), (vocab, width), "vocab_fsdp embed", embedding, params_dtype)
        self.blocks = jax.vmap(lambda r: Block(config, execution, params_dtype, r))(rngs.split(config.n_layers))
        self.ln_f = LayerNorm(width, config.layer_norm_eps, params_dtype)
        self.tied = config.tied_head
        if not config.tied_head:
            self.head_VD = param(rngs.params(), (vocab, width), "vocab_fsdp embed", head, params_dtype)
        self.head_bias_V = param(rngs.params(), (vocab,), "vocab", zeros, params_dtype)

    def context(self, positions_BT: jax.Array, slots: Slots | None, key: jax.Array | None) -> Context:
        return Context(positions_BT, slots, rotary_table(positions_BT, self.rotary_dim), key)

    def embed(self, tokens_BT: jax.Array, context: Context) -> jax.Array:
        return self.lookup(tokens_BT)

    def head(self) -> Head:
        return Head(
            (self.wte_VD if self.tied else self.head_VD).get_value(),
            self.head_bias_V.get_value(),
            self.shape.vocab_size,
        )
