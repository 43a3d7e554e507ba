"""GPT-2 against GPT2LMHeadModel of transformers, in float32."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from peers import assert_equals_transformers

from meshgpt.errors import UserError
from meshgpt.models import gpt2

ODD_HEADS = dataclasses.replace(tiny.GPT2, n_heads=3, d_model=21, d_ff=40, n_layers=3)
UNTIED = dataclasses.replace(tiny.GPT2, n_heads=1, d_model=10, tied_head=False, n_layers=1, vocab_multiple=128)


@pytest.mark.parametrize("config", [tiny.GPT2, ODD_HEADS, UNTIED], ids=["tied", "odd heads", "untied"])
def test_logits_and_gradients_equal_transformers(config: gpt2.GPT2Config) -> None:
    assert_equals_transformers(config)


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
