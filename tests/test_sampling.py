"""Drawing tokens, against NumPy and chi-squared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshgpt.errors import UserError
from meshgpt.inference.sampling import Knobs, Sampling, draw, filtered

filtered_jit, draw_jit = jax.jit(filtered), jax.jit(draw)


def kept_by_sorting(logits_V: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Which tokens top-k and then top-p keep, the way it is usually written."""
    order = np.argsort(-logits_V, kind="stable")
    order = order[: top_k or len(order)]
    p = np.exp(logits_V[order].astype(np.float64) - logits_V.max())
    before = np.cumsum(p / p.sum()) - p / p.sum()
    kept = np.zeros(len(logits_V), bool)
    kept[order[before < top_p] if top_p < 1 else order] = True
    return kept


@pytest.mark.parametrize("top_k", [0, 1, 7, 50, 10_000])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 1.0])
def test_filter_keeps_what_sorting_keeps(top_k: int, top_p: float) -> None:
    logits_RV = (np.random.default_rng(top_k).normal(size=(6, 200)) * [[0.01], [1], [1], [3], [10], [40]]).astype("f4")
    logits_RV[2] -= 1000
    found = filtered_jit(jnp.asarray(logits_RV), jnp.float32(top_k or np.inf), jnp.float32(top_p))
    for logits_V, found_V in zip(logits_RV, np.asarray(found), strict=True):
        kept = kept_by_sorting(logits_V, top_k, top_p)
        np.testing.assert_array_equal(found_V, np.where(kept, logits_V, -np.inf))


def test_filter_keeps_ties_and_never_the_padding() -> None:
    logits = jnp.array([[2.0, 1.0, 1.0, 0.0, -jnp.inf]])
    for top_k, top_p, expected in ((2, 1.0, 3), (np.inf, 0.7, 3), (np.inf, 0.1, 1), (4, 1.0, 4), (2, 0.1, 1)):
        found = filtered_jit(logits, jnp.float32(top_k), jnp.float32(top_p))
        assert np.isfinite(found).sum() == expected, (top_k, top_p)


@pytest.mark.parametrize("vary", ["prompt", "sample", "index"])
@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.5), Sampling(top_k=3), Sampling(temperature=2.0, top_p=0.6, top_k=5)],
    ids=["plain", "temperature", "top_k", "all"],
)
def test_draws_follow_the_distribution(sampling: Sampling, vary: str) -> None:
    logits_V = np.array([0.0, 1.5, -1.0, 0.7, 2.0, -0.3, 0.2, -np.inf], np.float32)
    count = 8000
    numbers = {name: jnp.full(count, 3, jnp.int32) for name in ("prompt", "sample", "index")}
    numbers[vary] = jnp.arange(count, dtype=jnp.int32)
    drawn = np.asarray(draw_jit(jnp.tile(logits_V, (count, 1)), *numbers.values(), Knobs.of(sampling)))

    scaled = logits_V / np.float32(sampling.temperature)
    kept = kept_by_sorting(scaled, sampling.top_k, sampling.top_p) & np.isfinite(logits_V)
    p = np.where(kept, np.exp(scaled), 0)
    observed, expected = np.bincount(drawn, minlength=8), count * p / p.sum()
    assert not observed[~kept].any()
    chi_squared = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_squared < 28, (observed, expected)  # at most 6 degrees of freedom: one seed in 10,000 is above


def test_temperature_0_and_nearly_0_take_the_likeliest() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(64, 50)).astype("f4") * 30)
    rows = jnp.arange(64, dtype=jnp.int32)
    for temperature in (0.0, 1e-30):
        drawn = draw_jit(logits, rows, rows, rows, Knobs.of(Sampling(temperature=temperature)))
        np.testing.assert_array_equal(drawn, np.argmax(logits, -1))


def test_another_seed_draws_otherwise() -> None:
    rows = jnp.arange(64, dtype=jnp.int32)
    first, again, other = (
        draw_jit(jnp.zeros((64, 50)), rows, rows, rows, Knobs.of(Sampling(seed=s))) for s in (7, 7, 8)
    )
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).mean() > 0.8


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("seed", -1),
        ("seed", 2**32),
        ("samples", 0),
    ],
)
def test_refuses(field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{field}=.*: give"):
        Sampling(**{field: value})
