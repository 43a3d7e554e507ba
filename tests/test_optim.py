"""Schedules against their formulas in float64, and which parameters decay."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from meshgpt import trees
from meshgpt.convert.hf_names import stored_tensors
from meshgpt.errors import UserError
from meshgpt.models.model import ModelConfig
from meshgpt.optim.config import (
    AdamW,
    Constant,
    Cosine,
    InverseSqrt,
    Linear,
    Piece,
    Piecewise,
    Schedule,
    decayed,
    learning_rate,
)

PEAK, WARMUP, STEPS = 6e-4, 10, 110


def _warm(after: Callable[[int], float], warmup: int = WARMUP) -> Callable[[int], float]:
    """The peak is reached by the warmup's last step; the schedule counts from the step after it."""
    return lambda t: PEAK * (t + 1) / warmup if t < warmup else PEAK * after(t - warmup)


def _cosine(final: float, steps: int) -> Callable[[int], float]:
    return lambda t: final + (1 - final) * (1 + math.cos(math.pi * min(t / steps, 1))) / 2


def _linear(final: float, steps: int) -> Callable[[int], float]:
    return lambda t: 1 + (final - 1) * min(t / steps, 1)


def _pieces(t: int) -> float:
    """Up to the peak over 5, down to a half along a cosine over 20, 0.3 for 10, then down to 0.1 in a line over 15."""
    if t < 5:
        return PEAK * (t + 1) / 5
    if t < 25:
        return PEAK * (0.5 + 0.5 * (1 + math.cos(math.pi * (t - 5) / 20)) / 2)
    if t < 35:
        return PEAK * 0.3
    return PEAK * (0.3 - 0.2 * min((t - 35) / 15, 1))


PIECES = Piecewise(
    pieces=(
        Piece(steps=5, to=1.0),
        Piece(steps=20, to=0.5, shape="cosine"),
        Piece(steps=10, to=0.3, shape="constant"),
        Piece(steps=15, to=0.1),
    )
)


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        (Cosine(), _warm(_cosine(0.1, 100))),
        (Cosine(final=0.0, steps=50), _warm(_cosine(0.0, 50))),
        (Linear(), _warm(_linear(0.0, 100))),
        (Linear(final=0.2, steps=30), _warm(_linear(0.2, 30))),
        (Constant(), _warm(lambda _: 1.0)),
        (InverseSqrt(), _warm(lambda t: math.sqrt(WARMUP / (WARMUP + t)))),
        (PIECES, _pieces),
    ],
    ids=lambda value: type(value).__name__ if dataclasses.is_dataclass(value) else "",
)
def test_schedule_equals_its_formula(schedule: Schedule, formula: Callable[[int], float]) -> None:
    optim = AdamW(peak_lr=PEAK, warmup_steps=WARMUP, schedule=schedule)
    steps = range(STEPS + 20)  # beyond the end, too
    with jax.numpy_dtype_promotion("standard"):  # as in the step: optax relies on it
        ours = jax.jit(jax.vmap(learning_rate(optim, STEPS)))(jnp.arange(len(steps), dtype=jnp.int32))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, [formula(t) for t in steps], rtol=2e-5, atol=1e-6 * PEAK)


@pytest.mark.parametrize("schedule", [Cosine(), Linear(), Constant(), InverseSqrt()], ids=lambda s: type(s).__name__)
def test_without_a_warmup_the_first_step_is_at_the_peak(schedule: Schedule) -> None:
    rate = learning_rate(AdamW(peak_lr=PEAK, warmup_steps=0, schedule=schedule), 5)
    with jax.numpy_dtype_promotion("standard"):
        assert float(rate(jnp.int32(0))) == pytest.approx(PEAK, rel=1e-6)


@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize("kind", [Cosine, Linear])
def test_a_warmup_as_a_piece_is_the_warmup(kind: type, final: float) -> None:
    """Every step of Cosine and Linear after a warmup is that of the same two pieces; none trains at 0."""
    warmed = learning_rate(AdamW(peak_lr=PEAK, warmup_steps=7, schedule=kind(final=final)), 40)
    shape = "cosine" if kind is Cosine else "linear"
    pieces = Piecewise(pieces=(Piece(steps=7, to=1.0), Piece(steps=33, to=final, shape=shape)))
    cut = learning_rate(AdamW(peak_lr=PEAK, schedule=pieces), 40)
    with jax.numpy_dtype_promotion("standard"):
        rates = [(float(warmed(jnp.int32(t))), float(cut(jnp.int32(t)))) for t in range(45)]
    np.testing.assert_allclose(*zip(*rates, strict=True), rtol=1e-5, atol=1e-9 * PEAK)
    assert rates[0][0] == pytest.approx(PEAK / 7, rel=1e-6)
    assert rates[6][0] == pytest.approx(PEAK, rel=1e-6)


def test_gptj_schedule_is_a_warmup_a_cosine_and_a_constant() -> None:
    """3,000 steps up to 1.2e-4, a cosine over 300,000 down to 1.2e-5, then constant."""
    rate = learning_rate(AdamW(peak_lr=1.2e-4, warmup_steps=3000, schedule=Cosine(final=0.1, steps=300_000)), 383_500)
    with jax.numpy_dtype_promotion("standard"):
        got = [float(rate(jnp.int32(t))) for t in (0, 2999, 3000, 153_000, 303_000, 383_499)]
    np.testing.assert_allclose(got, [4e-8, 1.2e-4, 1.2e-4, 6.6e-5, 1.2e-5, 1.2e-5], rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("config", [*tiny.FAMILIES, dataclasses.replace(tiny.GPT2, tied_head=False)])
def test_what_has_a_rank_above_one_in_the_unstacked_model_decays(config: ModelConfig) -> None:
    """By transformers' own parameters: matrices and embeddings decay, biases and norms do not."""
    peer = {name: parameter.ndim > 1 for name, parameter in tiny.torch_peer(config).named_parameters()}
    with jax.set_mesh(tiny.mesh()):
        shapes = tiny.model(config).abstract_params()
    ours = dict(trees.leaves_with_names(decayed(shapes)))
    for tensor in stored_tensors(config):
        for path in tensor.paths:
            assert ours[path] == peer[tensor.name], path


@pytest.mark.parametrize(
    "wrong",
    [
        {"peak_lr": 0.0},
        {"peak_lr": math.nan},
        {"warmup_steps": -1},
        {"clip_norm": -1.0},
        {"b1": 1.0},
        {"b2": -0.1},
        {"eps": 0.0},
        {"weight_decay": -0.1},
    ],
    ids=str,
)
def test_an_optimizer_that_cannot_work_is_refused(wrong: dict[str, float]) -> None:
    ((field, value),) = wrong.items()
    with pytest.raises(UserError, match=rf"optim\.{field}={value}"):
        AdamW(**wrong)


@pytest.mark.parametrize("kind", [Cosine, Linear])
@pytest.mark.parametrize("wrong", [{"steps": 0}, {"final": -0.1}], ids=str)
def test_a_schedule_that_cannot_work_is_refused(kind: type, wrong: dict[str, float]) -> None:
    ((field, value),) = wrong.items()
    with pytest.raises(UserError, match=rf"{field}={value}"):
        kind(**wrong)


def test_a_piece_of_no_steps_and_a_sequence_of_no_pieces_are_refused() -> None:
    with pytest.raises(UserError, match="piece of 0 steps"):
        Piece(steps=0, to=1.0)
    with pytest.raises(UserError, match="no pieces"):
        Piecewise(pieces=())
