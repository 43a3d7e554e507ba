"""GPT-J against GPTJForCausalLM of transformers (PyTorch), in float32."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from peers import assert_equals_transformers

from meshgpt.errors import UserError
from meshgpt.models import gptj

ODD_HEADS = dataclasses.replace(tiny.GPTJ, n_heads=3, d_model=30, rotary_dim=6, d_ff=44, n_layers=3)
ONE_HEAD = dataclasses.replace(tiny.GPTJ, n_heads=1, d_model=12, rotary_dim=12, n_layers=1, vocab_multiple=128)


TIED = dataclasses.replace(tiny.GPTJ, tied_head=True)


@pytest.mark.parametrize(
    "config",
    [tiny.GPTJ, ODD_HEADS, ONE_HEAD, TIED],
    ids=["rotary below head", "odd heads", "rotary whole head", "tied"],
)
def test_logits_and_gradients_equal_transformers(config: gptj.GPTJConfig) -> None:
    assert_equals_transformers(config)


def test_initialisation_is_that_of_mesh_transformer_jax() -> None:
    """Normal, cut off at twice its scale, which leaves 0.8796 of it as standard deviation: o and fc_out
    (2/L)/sqrt(D), embedding 1/sqrt(V), the rest 1/sqrt(fan in); biases 0, scales 1."""
    config = gptj.GPTJConfig(vocab_size=500, n_positions=64, n_layers=3, n_heads=4, d_model=64, rotary_dim=8)
    with jax.set_mesh(tiny.mesh()):
        values = tiny.to_numpy(jax.jit(tiny.model(config).init)(jax.random.key(1)))
    small = 2 / 3 / 8
    expected = {"o_NHD": small, "down_FD": small, "wte_VD": 500**-0.5}
    for path, value in values.items():
        if path.endswith("scale_D"):
            assert (value == 1).all(), path
        elif "bias" in path:
            assert (value == 0).all(), path
        else:
            scale = expected.get(path.rsplit("/", 1)[-1], 1 / 8)
            std = 0.8796 * scale
            assert 1.9 * scale < np.abs(value).max() <= 2.001 * scale, path
            assert abs(value.std() / std - 1) < 5 / np.sqrt(2 * value.size), path
            assert abs(value.mean()) < 5 * std / np.sqrt(value.size), path


@pytest.mark.parametrize("rotary_dim", [0, 3, 6, -2])
def test_a_rotary_dim_that_does_not_fit_is_refused(rotary_dim: int) -> None:
    with pytest.raises(UserError, match=rf"model.rotary_dim={rotary_dim}.*head size.*= 4"):
        dataclasses.replace(tiny.GPTJ, rotary_dim=rotary_dim)
