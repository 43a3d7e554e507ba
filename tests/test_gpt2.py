"""GPT-2 against GPT2LMHeadModel of transformers, in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from peers import assert_equals_transformers

from meshgpt.distributed.mesh import spec
from meshgpt.errors import UserError
from meshgpt.models import gpt2
from meshgpt.models.decoder import single_blocks
from meshgpt.models.kv_cache import Slots
from meshgpt.models.layers import Execution
from meshgpt.trees import Tree

ODD_HEADS = dataclasses.replace(tiny.GPT2, n_heads=3, d_model=21, d_ff=40, n_layers=3)
UNTIED = dataclasses.replace(tiny.GPT2, n_heads=1, d_model=10, tied_head=False, n_layers=1, vocab_multiple=128)


CRFM = dataclasses.replace(tiny.GPT2, inverse_layer_attention=True, n_layers=4, activation="silu")
VARIANTS = {
    "tied": tiny.GPT2,
    "odd heads": ODD_HEADS,
    "untied": UNTIED,
    "exact gelu": dataclasses.replace(tiny.GPT2, activation="gelu"),
    "relu": dataclasses.replace(tiny.GPT2, activation="relu"),
    "silu, scores by layer": CRFM,
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_and_gradients_equal_transformers(config: gpt2.GPT2Config) -> None:
    assert_equals_transformers(config)


def test_scores_by_layer_are_the_same_in_line_in_a_scan_and_with_a_cache() -> None:
    scanned, in_line = tiny.model(CRFM), tiny.model(CRFM, Execution(unroll=0))

    @jax.jit
    def run(params: Tree, tokens_BT: jax.Array, seen_BTS: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        decoder, slots = scanned.bind(params), Slots(first=jnp.int32(0), seen_BTS=seen_BTS)
        positions_BT = jnp.broadcast_to(jnp.arange(6), (2, 6))
        caches, blocks = decoder.empty_caches(2, 6), single_blocks(decoder)
        cached, _ = decoder.forward_cached(tokens_BT, positions_BT, slots, caches, blocks)
        return decoder.hidden(tokens_BT), in_line.bind(params).hidden(tokens_BT), cached

    with jax.set_mesh(tiny.mesh()):
        seen = jax.device_put(np.tri(6, dtype=bool)[None].repeat(2, 0), spec("batch _ _"))
        wanted, *others = run(tiny.params(CRFM), jax.device_put(tiny.tokens(2, 6), spec("batch _")), seen)
    for found in others:
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=0)


def test_an_activation_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.activation='tanh': give one of gelu_tanh, gelu, relu, silu"):
        gpt2.GPT2Config(activation="tanh")


def test_initialisation_is_as_published() -> None:
    """normal(0.02), projections into the residual 1/sqrt(2 L) of it, biases 0, scales 1 (paper, section 2.3)."""
    config = gpt2.GPT2Config(vocab_size=500, n_positions=64, n_layers=3, n_heads=4, d_model=64)
    with jax.set_mesh(tiny.mesh()):
        values = tiny.to_numpy(jax.jit(tiny.model(config).init)(jax.random.key(1)))
    for path, value in values.items():
        if path.endswith("scale_D"):
            assert (value == 1).all(), path
        elif "bias" in path:
            assert (value == 0).all(), path
        else:
            residual = path.endswith(("o_NHD", "down_FD"))
            expected = 0.02 / np.sqrt(2 * 3) if residual else 0.02
            assert abs(value.std() / expected - 1) < 5 / np.sqrt(2 * value.size), path
            assert abs(value.mean()) < 5 * expected / np.sqrt(value.size), path


@pytest.mark.parametrize("field", ["embd_dropout", "attn_dropout", "resid_dropout"])
@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_that_is_none_is_refused(field: str, rate: float) -> None:
    with pytest.raises(UserError, match=rf"model.{field}={rate}"):
        gpt2.GPT2Config(**{field: rate})
