"""What both families share: causality, the cache, the padded vocabulary, sizes that make no sense."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from meshgpt.distributed.mesh import spec
from meshgpt.errors import UserError
from meshgpt.models.decoder import Shape, single_blocks
from meshgpt.models.kv_cache import Slots
from meshgpt.models.model import ModelConfig
from meshgpt.objectives.loss import NextToken, next_token_loss

F32 = jnp.float32


@pytest.mark.parametrize("config", tiny.FAMILIES, ids=tiny.name)
def test_a_position_depends_on_itself_and_the_past_only(config: ModelConfig) -> None:
    """By gradient: hidden state t with respect to the embedding of every token, all tokens of the row being distinct.

    A random projection of the hidden state, for the sum of what a norm gives is constant.
    """
    length = 8
    row = np.random.default_rng(0).permutation(config.vocab_size)[:length].astype(np.int32)
    direction = jnp.asarray(np.random.default_rng(1).normal(size=config.d_model), F32)
    with jax.set_mesh(tiny.mesh()):
        model, params = tiny.model(config), tiny.params(config)

        @jax.jit
        @jax.grad
        def influence(wte_VD: jax.Array, chosen_T: jax.Array) -> jax.Array:
            hidden = model.bind(params | {"wte_VD": wte_VD}).hidden(jax.device_put(row[None], spec("batch _")))
            return (hidden * chosen_T[None, :, None] * direction[None, None]).sum()

        jacobian = np.stack([influence(params["wte_VD"], chosen) for chosen in jnp.eye(length, dtype=F32)])[:, row]
    reach = np.abs(jacobian).max(-1)
    for t in range(length):
        assert (reach[t, t + 1 :] == 0).all(), f"position {t} sees the future"
        assert (reach[t, : t + 1] > 1e-6).all(), f"position {t} does not see its past"


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("config", tiny.FAMILIES, ids=tiny.name)
def test_one_row_and_one_token_are_enough(config: ModelConfig, rows: int, length: int) -> None:
    """Axes of one element (also one pair of rotary dimensions) keep their sharding: the loss and the cache trace."""
    with jax.set_mesh(tiny.mesh()):
        model = tiny.model(config)
        tokens = jax.device_put(tiny.tokens(rows, length + 1), spec("batch _"))
        weights = jax.device_put(np.ones((rows, length), np.float32), spec("batch _"))
        gradient = jax.grad(next_token_loss(model, NextToken()), has_aux=True)
        jax.eval_shape(gradient, model.abstract_params(), tokens, weights, None)

        def extend(params: dict) -> jax.Array:
            decoder = model.bind(params)
            positions = jnp.zeros_like(tokens) + jnp.arange(length + 1)[None]
            slots = Slots(jnp.int32(0), jnp.ones((rows, length + 1, 8), bool))
            return decoder.forward_cached(
                tokens, positions, slots, decoder.empty_caches(rows, 8), single_blocks(decoder)
            )[0]

        assert jax.eval_shape(extend, model.abstract_params()).shape == (rows, length + 1, config.d_model)


@functools.cache
def _full(config: ModelConfig, rows: int, length: int) -> np.ndarray:
    """Logits of `tiny.tokens(rows, length)` by the plain forward pass."""
    with jax.set_mesh(tiny.mesh()):
        model = tiny.model(config)

        @jax.jit
        def logits(params: dict, tokens: jax.Array) -> jax.Array:
            decoder = model.bind(params)
            return decoder.logits(decoder.hidden(tokens))

        return np.asarray(logits(tiny.params(config), jnp.asarray(tiny.tokens(rows, length))))


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 4)])
@pytest.mark.parametrize("config", tiny.FAMILIES, ids=tiny.name)
def test_cached_decoding_equals_the_full_forward_pass(config: ModelConfig, mesh: tuple[int, int, int]) -> None:
    """Rows of unequal length: a prefill of 4 tokens, of which each row keeps its own number, then one at a time."""
    rows, length, keep = 2, 9, np.array([4, 2])
    expected, tokens = _full(config, rows, length), tiny.tokens(rows, length)
    with jax.set_mesh(tiny.mesh(*mesh)):
        model, params = tiny.model(config), tiny.params(config)

        @jax.jit
        def extend(
            params: dict, tokens: jax.Array, positions: jax.Array, first: jax.Array, seen: jax.Array, caches: tuple
        ) -> tuple[jax.Array, tuple]:
            decoder = model.bind(params)
            x, caches = decoder.forward_cached(tokens, positions, Slots(first, seen), caches, single_blocks(decoder))
            return decoder.logits(x), caches

        def put(values: np.ndarray, axes: str) -> jax.Array:
            return jax.device_put(values, spec(axes))

        def extended(of: np.ndarray, positions: np.ndarray, first: int, seen: np.ndarray, caches: tuple):
            return extend(
                params, put(of, "batch _"), put(positions, "batch _"), jnp.int32(first), put(seen, "batch _ _"), caches
            )

        caches = model.bind(params).empty_caches(rows, 12)
        each, slots, order = np.arange(rows), np.arange(12), np.tile(np.arange(4), (rows, 1))
        got, caches = extended(tokens[:, :4], order, 0, slots <= order[..., None], caches)
        np.testing.assert_allclose(got, expected[:, :4], atol=2e-5)
        for at in range(5):
            positions = keep + at
            seen = (slots < keep[:, None]) | ((slots >= 4) & (slots <= 4 + at))
            one = tokens[each, positions][:, None]
            got, caches = extended(one, positions[:, None], 4 + at, seen[:, None], caches)
            np.testing.assert_allclose(got[:, 0], expected[each, positions], atol=2e-5)


def test_the_vocabulary_is_padded_and_the_padding_never_wins() -> None:
    assert tiny.GPT2.padded_vocab == 128
    assert dataclasses.replace(tiny.GPT2, vocab_size=128).padded_vocab == 128
    logits = _full(tiny.GPT2, 2, 9)
    assert logits.shape[-1] == 128
    assert np.isneginf(logits[..., tiny.VOCAB :]).all()
    assert np.isfinite(logits[..., : tiny.VOCAB]).all()


def test_a_lookup_is_a_row_and_its_gradient_a_sum() -> None:
    """All occurrences of a token add up in float32, also where the model computes in 16 bits."""
    with jax.set_mesh(tiny.mesh(2, 2, 2)):
        model = tiny.model(tiny.GPT2)
        params = tiny.params(tiny.GPT2)
        tokens = jax.device_put(np.full((4, 6), 7, np.int32), spec("batch _"))
        rows, pull = jax.vjp(lambda p: model.bind(p).lookup(tokens), params)
        gradient = pull(jnp.ones_like(rows))[0]["wte_VD"]
    table = tiny.numpy_params(tiny.GPT2)["wte_VD"]
    np.testing.assert_array_equal(rows, np.broadcast_to(table[7], rows.shape))
    expected = np.zeros_like(table)
    expected[7] = 24
    np.testing.assert_array_equal(gradient, expected)


def test_learned_positions_follow_the_row_in_the_cache() -> None:
    """GPT-2 adds the embedding of each token's own position, whatever its slot."""
    with jax.set_mesh(tiny.mesh()):
        decoder = tiny.model(tiny.GPT2).bind(tiny.params(tiny.GPT2))
        slots = Slots(jnp.int32(5), jnp.ones((2, 1, 8), bool))
        context = decoder.context(jnp.array([[3], [5]]), slots, None)
        x = decoder.embed(jnp.zeros((2, 1), jnp.int32), context)
    values = tiny.numpy_params(tiny.GPT2)
    np.testing.assert_allclose(x[:, 0], values["wte_VD"][0] + values["wpe_SD"][[3, 5]], rtol=1e-6)


@pytest.mark.parametrize("field", ["vocab_size", "n_positions", "n_layers", "n_heads", "d_model", "vocab_multiple"])
@pytest.mark.parametrize("value", [0, -3])
def test_a_size_below_one_is_refused(field: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"model\.{field}={value}: give a positive number"):
        dataclasses.replace(tiny.GPT2, **{field: value})


def test_a_negative_width_of_the_mlp_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.d_ff=-4"):
        dataclasses.replace(tiny.GPT2, d_ff=-4)


def test_heads_that_do_not_divide_the_width_are_refused_with_a_width_that_they_do() -> None:
    with pytest.raises(UserError, match=r"d_model=50 .*n_heads=12.*for example 60"):
        Shape(vocab_size=9, n_positions=9, n_layers=1, n_heads=12, d_model=50)


def test_sizes() -> None:
    shape = Shape(vocab_size=9, n_positions=9, n_layers=1, n_heads=3, d_model=12)
    assert (shape.mlp_width, shape.head_size) == (48, 4)
    assert dataclasses.replace(shape, d_ff=5).mlp_width == 5
