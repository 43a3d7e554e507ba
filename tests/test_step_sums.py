"""Sums over many terms of a step, and terms that are not there: microbatches in bfloat16, empty ones in float16."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from meshgpt.models import decoder, gpt2
from meshgpt.models.precision import LossScaling, Precision
from meshgpt.objectives.loss import NextToken, next_token_loss
from meshgpt.optim.config import Adafactor, AdamW, Constant, Lion, Optimizer
from meshgpt.training.step import TrainState, from_params, make_train_step

OPTIM = AdamW(peak_lr=1e-2, warmup_steps=0, schedule=Constant(), weight_decay=0.0)
FLOAT16 = Precision(compute="float16", loss_scaling=LossScaling(initial=8.0))


def linear(params: dict, tokens: jax.Array, weights: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Its gradient is the tokens'."""
    del key
    x = tokens[:, :-1].astype(jnp.float32)
    return (weights * x * params["w_DF"].astype(jnp.float32)).sum(), weights.sum()


def half(params: dict, tokens: jax.Array, weights: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The same through float16."""
    del key
    x = tokens[:, :-1].astype(jnp.float16)
    return (weights * (x * params["w_DF"].astype(jnp.float16)).astype(jnp.float32)).sum(), weights.sum()


@pytest.mark.parametrize("accumulate", [512, 2048])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_sum_of_many_microbatches_is_float64s(accumulate: int, dtype: Any) -> None:
    """Gradients of small integers are exact in bfloat16, and their sum in float32; in bfloat16 a part of it is lost."""
    rows = np.random.default_rng(0).integers(1, 8, (accumulate, 33), dtype=np.int32)
    exact = rows[:, :-1].astype(np.float64).sum(0)
    with jax.set_mesh(tiny.mesh()):
        params = {"w_DF": jnp.ones((1, 32), dtype)}
        step = jax.jit(make_train_step(linear, OPTIM, 1, None, inspect=lambda gradients, _: gradients["w_DF"]))
        _, metrics = step(from_params(params, OPTIM, Precision(params=dtype)), *tiny.batch(rows, accumulate))
    np.testing.assert_array_equal(np.asarray(metrics["inspected"], np.float64)[0], exact)
    assert float(metrics["grad_norm"]) == pytest.approx(np.linalg.norm(exact / rows[:, :-1].size), rel=1e-6)


def float16_step(weights_of_rows: list[float], accumulate: int) -> tuple[TrainState, TrainState, dict[str, float]]:
    """A step on microbatches with these weights: the state before and after, and the metrics."""
    rows = np.arange(1, 4 * len(weights_of_rows) + 1, dtype=np.int32).reshape(-1, 4)
    with jax.set_mesh(tiny.mesh()):
        tokens, weights = tiny.batch(rows, accumulate)
        factors = np.array(weights_of_rows, np.float32).reshape(accumulate, -1, 1)
        state = from_params({"w_DF": jnp.ones((1, 3))}, OPTIM, FLOAT16)
        new, metrics = jax.jit(make_train_step(half, OPTIM, 1, None, FLOAT16))(state, tokens, weights * factors)
    return state, new, {name: float(value) for name, value in metrics.items()}


def test_a_microbatch_without_a_trained_token_changes_nothing() -> None:
    _, with_empty, metrics = float16_step([1, 1, 0, 0], accumulate=2)
    _, without, alone = float16_step([1, 1], accumulate=1)
    assert metrics == alone
    assert metrics["skipped_steps"] == 0
    tiny.assert_same_bits((with_empty.params, with_empty.loss_scale), (without.params, without.loss_scale))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_without_a_trained_token_changes_nothing_and_is_no_overflow(accumulate: int) -> None:
    before, after, metrics = float16_step([0] * 4, accumulate)
    kept = [(state.params, state.opt_state, state.loss_scale) for state in (after, before)]
    tiny.assert_same_bits(*kept)
    assert int(after.step) == 1
    assert (metrics["skipped_steps"], metrics["streak"], metrics["tokens"]) == (0, 0, 0)


@pytest.mark.parametrize("optim", [Adafactor(), Lion()], ids=lambda optim: type(optim).__name__)
def test_the_bias_of_the_keys_whose_gradient_is_zero_stays(optim: Optimizer) -> None:
    """It adds one number to all scores of a query, which a softmax takes out; what is left of it is rounding noise."""
    optim = dataclasses.replace(optim, peak_lr=1e-2, warmup_steps=0, schedule=Constant())
    after = {}
    for mesh in ((1, 1, 1), (2, 2, 2)) if isinstance(optim, Adafactor) else ((1, 1, 1),):
        with jax.set_mesh(tiny.mesh(*mesh)):
            step = jax.jit(make_train_step(next_token_loss(tiny.model(tiny.GPT2), NextToken()), optim, 4, None))
            state = from_params(tiny.params(tiny.GPT2), optim)
            for seed in range(3):
                state, _ = step(state, *tiny.batch(tiny.tokens(8, 17, seed)))
            after[mesh] = tiny.to_numpy(state.params)
    begun = tiny.numpy_params(tiny.GPT2)
    for mesh, params in after.items():
        np.testing.assert_array_equal(params["blocks/attn/k_bias_NH"], begun["blocks/attn/k_bias_NH"])
        if isinstance(optim, Adafactor):
            for path, value in params.items():
                np.testing.assert_allclose(value, after[1, 1, 1][path], atol=2e-5, err_msg=f"{mesh} {path}")


def test_dropout_keys_of_embedding_and_blocks_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """`jax.random.split(key)[3]` is `fold_in(key, 3)`: blocks whose keys were split off the embedding's shared one."""
    seen: dict[str, jax.Array] = {}
    run_stack, dropout = decoder.run_stack, gpt2.dropout

    def noted_stack(block: Any, blocks: Any, x: jax.Array, key: jax.Array, *rest: Any, **more: Any) -> jax.Array:
        seen["blocks"] = key
        return run_stack(block, blocks, x, key, *rest, **more)

    def noted_dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
        seen.setdefault("embedding", key)
        return dropout(x, rate, key)

    monkeypatch.setattr(decoder, "run_stack", noted_stack)
    monkeypatch.setattr(gpt2, "dropout", noted_dropout)
    config = dataclasses.replace(tiny.GPT2, embd_dropout=0.1, resid_dropout=0.1)
    with jax.set_mesh(tiny.mesh()):
        tokens, weights = (a[0] for a in tiny.batch(tiny.tokens(8, 17)))
        next_token_loss(tiny.model(config), NextToken())(tiny.params(config), tokens, weights, jax.random.key(0))
    keys = [seen["embedding"], *jax.random.split(seen["blocks"], 48)]
    assert len({np.asarray(jax.random.key_data(key)).tobytes() for key in keys}) == 49
