"""float16 with a dynamic loss scale, and bfloat16 parameters rounded stochastically."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from meshgpt import trees
from meshgpt.distributed.mesh import spec
from meshgpt.errors import UserError
from meshgpt.models.precision import LossScale, LossScaling, Precision, stochastic_round
from meshgpt.objectives.loss import NextToken, next_token_loss
from meshgpt.optim.config import AdamW, Constant
from meshgpt.training.step import TrainState, from_params, make_train_step

OPTIM = AdamW(peak_lr=1e-2, warmup_steps=0, schedule=Constant(), eps=1e-4, weight_decay=0.0)


def test_the_scale_halves_on_overflow_and_doubles_after_good_steps_between_its_bounds() -> None:
    scaling = LossScaling(initial=8.0, growth_interval=3, floor=2.0)
    scale, seen = LossScale.fresh(scaling), []
    for finite in (True, True, True, True, False, False, False, True, True, True, True):
        seen.append(float(scale.value))
        scale = scale.after(jnp.asarray(finite), scaling)
    assert seen == [8, 8, 8, 16, 16, 8, 4, 2, 2, 2, 4]
    top = LossScale(jnp.float32(2.0**24), jnp.int32(2)).after(jnp.asarray(True), scaling)
    assert float(top.value) == 2.0**24


@pytest.mark.parametrize("wrong", [{"initial": 0.5}, {"growth_interval": 0}, {"floor": 0.0}, {"initial": 2.0**30}])
def test_a_scale_that_cannot_be_is_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match="2\\^24"):
        LossScaling(**wrong)


def _half(params: dict, tokens: jax.Array, weights: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Its gradient, a token's id, passes through float16 before it is summed."""
    x = tokens[:, :-1].astype(jnp.float16)
    return (weights * (x * params["w_DF"].astype(jnp.float16)).astype(jnp.float32)).sum(), weights.sum()


def _run(scaling: LossScaling, steps: int, accumulate: int = 1) -> tuple[TrainState, list[dict[str, float]]]:
    precision = Precision(compute="float16", loss_scaling=scaling)
    with jax.set_mesh(tiny.mesh()):
        step = jax.jit(make_train_step(_half, OPTIM, steps, None, precision), donate_argnums=0)
        state, seen = from_params({"w_DF": jnp.ones((1, 3))}, OPTIM, precision), []
        for _ in range(steps):
            state, metrics = step(state, *tiny.batch(np.array([[1000, 2, 3, 4]] * 4, np.int32), accumulate))
            seen.append({name: float(value) for name, value in metrics.items()})
    return state, seen


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_overflows_on_purpose_recovers(accumulate: int) -> None:
    """2^15 times 1000 / 12 is beyond float16's 65504, and so on down to 2^9; then no step is skipped any more."""
    state, seen = _run(LossScaling(), 10, accumulate)
    sizes = [metrics["loss_scale"] for metrics in seen]
    skipped = int(seen[-1]["skipped_steps"])
    assert sizes[: skipped + 1] == [2.0 ** (15 - i) for i in range(skipped + 1)]
    assert 4 <= skipped <= 8
    assert sizes[skipped:] == [sizes[skipped]] * (10 - skipped)
    assert [metrics["streak"] for metrics in seen[skipped:]] == [0] * (10 - skipped)
    # The steps taken are those of a run that never overflowed.
    plain, other = _run(LossScaling(initial=1.0), 10 - skipped, accumulate)
    np.testing.assert_allclose(state.params["w_DF"], plain.params["w_DF"], rtol=1e-5)
    assert seen[-1]["grad_norm"] == pytest.approx(other[-1]["grad_norm"], rel=1e-3)
    assert {"loss_scale/value", "loss_scale/good_steps"} <= {name for name, _ in trees.leaves_with_names(state.items())}


def test_float32_has_no_scale() -> None:
    with jax.set_mesh(tiny.mesh()):
        state = from_params({"w_DF": jnp.ones((1, 3))}, OPTIM)
    assert state.loss_scale is None
    assert TrainState(**state.items()) == state


def test_float16_computes_the_losses_of_float32() -> None:
    losses = {}
    rows = tiny.tokens(4, 9)
    for compute in ("float32", "float16"):
        precision = Precision(compute=compute)
        with jax.set_mesh(tiny.mesh()):
            model = tiny.model(tiny.GPTJ, precision=precision)
            step = jax.jit(make_train_step(next_token_loss(model, NextToken()), OPTIM, 5, None, precision))
            state, losses[compute] = from_params(tiny.params(tiny.GPTJ), OPTIM, precision), []
            for _ in range(5):
                state, metrics = step(state, *tiny.batch(rows))
                losses[compute].append(float(metrics["loss"]))
            assert int(metrics["skipped_steps"]) == 0
    assert losses["float16"] == pytest.approx(losses["float32"], rel=2e-3)
    assert losses["float16"] != losses["float32"]
    assert losses["float16"][-1] < losses["float16"][0] - 0.5


def test_stochastic_rounding_keeps_the_mean_and_what_needs_no_rounding() -> None:
    x = jnp.full((200, 500), 1.0 + 2.0**-10, jnp.float32)  # an eighth of the way from 1 to the next bfloat16
    rounded = np.asarray(stochastic_round(x, jax.random.key(0)), np.float64)
    assert set(np.unique(rounded)) == {1.0, 1.0 + 2.0**-7}
    # 100,000 draws of probability 1/8: three standard deviations.
    assert (rounded > 1).mean() == pytest.approx(1 / 8, abs=3 * (7 / 64 / 1e5) ** 0.5)
    exact = jnp.asarray([0.0, -1.5, 3e38, np.inf, -np.inf], jnp.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(stochastic_round(exact.astype(jnp.float32), jax.random.key(1)), exact)
    assert np.isnan(
        np.asarray(stochastic_round(jnp.asarray([np.nan], jnp.float32), jax.random.key(2)), np.float32)
    ).all()


def test_stochastic_rounding_is_the_same_on_every_mesh() -> None:
    x = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
    results = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        with jax.set_mesh(tiny.mesh(*shape)):
            results.append(
                np.asarray(jax.jit(stochastic_round)(jax.device_put(x, spec("fsdp mlp")), jax.random.key(3)))
            )
    np.testing.assert_array_equal(*results)


def test_small_updates_of_bfloat16_parameters_are_kept_on_average_or_lost() -> None:
    """1,000 updates of 1e-4 to parameters near 1, whose next lower bfloat16 is 0.004 away."""
    optim = dataclasses.replace(OPTIM, peak_lr=1e-4, eps=1e-12)
    moved = {}

    def loss(params: dict, tokens: jax.Array, weights: jax.Array, key: None) -> tuple[jax.Array, jax.Array]:
        return params["w_DF"].astype(jnp.float32).sum() * weights.sum(), weights.sum()

    for rounding in ("nearest", "stochastic"):
        precision = Precision(params="bfloat16", rounding=rounding)
        with jax.set_mesh(tiny.mesh()):
            key = jax.random.key(0) if rounding == "stochastic" else None
            step = jax.jit(make_train_step(loss, optim, 300, None, precision, key))
            state = from_params({"w_DF": jnp.ones((32, 32), jnp.bfloat16)}, optim, precision)
            batch = tiny.batch(np.zeros((1, 3), np.int32))
            for _ in range(300):
                state, _ = step(state, *batch)
            moved[rounding] = 1 - float(state.params["w_DF"].astype(jnp.float32).mean())
    assert moved["nearest"] == 0
    assert moved["stochastic"] == pytest.approx(300 * 1e-4, rel=0.05)


def test_stochastic_rounding_of_float32_is_refused() -> None:
    with pytest.raises(UserError, match="bfloat16"):
        Precision(rounding="stochastic")
