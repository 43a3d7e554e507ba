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


@pytest.mark.parametrize("unroll", [0, 2])
def test_scores_by_layer_are_the_same_in_line_in_a_scan_and_with_a_cache(unroll: int) -> None:
    tokens = tiny.tokens(2, 6)
    with jax.set_mesh(tiny.mesh()):
        tokens_BT = jax.device_put(tokens, spec("batch _"))
        scanned = tiny.model(CRFM).bind(tiny.params(CRFM))
        other = tiny.model(CRFM, Execution(unroll=unroll)).bind(tiny.params(CRFM))
        wanted = scanned.hidden(tokens_BT)
        np.testing.assert_allclose(other.hidden(tokens_BT), wanted, atol=1e-5, rtol=0)
        seen = jnp.broadcast_to(jnp.tril(jnp.ones((6, 6), bool)), (2, 6, 6))
        slots = Slots(first=jnp.int32(0), seen_BTS=jax.device_put(seen, spec("batch _ _")))
        cached, _ = other.forward_cached(
            tokens_BT, jnp.broadcast_to(jnp.arange(6), (2, 6)), slots, other.empty_caches(2, 6), single_blocks(other)
        )
    np.testing.assert_allclose(cached, wanted, atol=1e-5, rtol=0)


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
