"""Scaling laws against the papers' own numbers and a published family of models; fits against known laws."""

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.optimize._numdiff import approx_derivative

from meshgpt.models.flops import count_parameters, flops_per_token
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.gptj import GPTJConfig
from meshgpt.models.model import parameter_shapes
from meshgpt.planning.scaling_laws import (
    BESIROGLU,
    HOFFMANN,
    KAPLAN,
    LAWS,
    PF_DAY,
    ModelShape,
    Parametric,
    Points,
    _jacobian,
    _log_loss,
    critical_batch,
    fit,
    learning_rate,
    shape_for,
)

# The GPT-2 family of MosaicML's composer: its card's table, and the prediction in the first two lines of its recipes
# (composer/yamls/models/gpt2_*.yaml).
FAMILY = {
    "52M": {"layers": 8, "d": 512, "perplexity": 32.54, "loss": 3.482618529842513},
    "83M": {"layers": 10, "d": 640, "perplexity": 27.84, "loss": 3.32654107284093},
    "125M": {"layers": 12, "d": 768, "perplexity": 24.64, "loss": 3.2042232768969785},
}


@pytest.mark.parametrize("name", FAMILY)
def test_predictions_of_the_gpt2_family_are_kaplans_frontier_at_the_non_embedding_size(name):
    """L(Cmin) where N(Cmin) = 12 n_layer d_model^2: every printed digit, not only 1%."""
    member = FAMILY[name]
    choice = KAPLAN.of_parameters(12 * member["layers"] * member["d"] ** 2)
    assert choice.loss == pytest.approx(member["loss"], rel=1e-14)
    assert choice.perplexity == pytest.approx(member["perplexity"], abs=0.005)


@pytest.mark.parametrize(
    ("hours", "shape", "parameters", "published_parameters", "published_tokens"),
    [
        (6, (6, 576, 2368), 53_914_560, "53.9M", 4.6e9),
        (12, (8, 720, 2800), 85_842_800, "85.8M", 5.5e9),
        (24, (9, 816, 3320), 114_677_880, "114M", 6.7e9),
    ],
)
def test_parameters_and_tokens_of_the_gpt2_family_are_those_of_its_first_configurations(
    hours, shape, parameters, published_parameters, published_tokens
):
    """The table's counts belong to shapes that were replaced before the card was written (docs/scaling.md)."""
    budget = KAPLAN.of_cmin(71e12 / 4 * hours * 3600 / PF_DAY)  # an RTX 3090 at a quarter of 71 TFLOP/s
    assert math.floor(budget.tokens / 1e8) / 10 == pytest.approx(published_tokens / 1e9)
    layers, d, f = shape
    config = GPT2Config(n_layers=layers, d_model=d, n_heads=d // 48, d_ff=f)
    counted = count_parameters(parameter_shapes(config), config.vocab_size)
    assert counted.total == parameters
    digits = published_parameters.removesuffix("M")
    assert str(parameters / 1e6).startswith(digits)
    assert 12 * layers * d * d == pytest.approx(budget.parameters, rel=0.21)  # it rounds depth up, and width to heads


def test_kaplans_budget_is_consistent():
    for flops in (1e17, 1e20, 1e23):
        choice = KAPLAN.of_flops(flops)
        assert choice.flops == pytest.approx(flops)
        assert KAPLAN.of_tokens(choice.tokens).parameters == pytest.approx(choice.parameters)
        assert KAPLAN.of_parameters(choice.parameters).tokens == pytest.approx(choice.tokens)


@pytest.mark.parametrize(
    ("parameters", "flops", "tokens"), [(400e6, 2.21e19, 9.2e9), (1e9, 1.62e20, 27.1e9), (10e9, 2.46e22, 410.1e9)]
)
def test_hoffmanns_optimum_is_that_of_its_table(parameters, flops, tokens):
    """Hoffmann et al. 2022, table A3, approach 3; rounded sizes, and constants of four digits."""
    choice = HOFFMANN.of_flops(flops)
    assert choice.parameters == pytest.approx(parameters, rel=0.06)
    assert choice.tokens == pytest.approx(tokens, rel=0.06)


def test_besiroglus_optimum_has_about_twenty_tokens_a_parameter_at_chinchillas_budget():
    choice = BESIROGLU.of_flops(5.76e23)
    assert choice.tokens / choice.parameters == pytest.approx(20, abs=3)
    assert BESIROGLU.beta / (BESIROGLU.alpha + BESIROGLU.beta) == pytest.approx(0.5126, abs=5e-5)


@pytest.mark.parametrize("law", [HOFFMANN, BESIROGLU])
@pytest.mark.parametrize("flops", [1e18, 1e21])
def test_the_closed_form_is_the_minimum(law, flops):
    found = minimize_scalar(lambda x: law.loss(math.exp(x), flops / 6 / math.exp(x)), bounds=(12, 28), method="bounded")
    choice = law.of_flops(flops)
    assert choice.loss == pytest.approx(found.fun, rel=1e-9)
    assert choice.flops == pytest.approx(flops)
    assert law.of_tokens(choice.tokens).parameters == pytest.approx(choice.parameters)
    assert law.of_parameters(choice.parameters).tokens == pytest.approx(choice.tokens)


def test_laws_disagree_as_is_known():
    """Kaplan puts more of a large budget into parameters than Hoffmann does (Hoffmann et al. 2022, section 1)."""
    kaplan, hoffmann, besiroglu = (law.of_flops(5.76e23).parameters for law in LAWS)
    assert kaplan > 3 * besiroglu > 3 * 0.5 * hoffmann


def test_batch_and_learning_rate_follow_kaplan():
    assert critical_batch(2.0) == pytest.approx(2e8 / 2 ** (1 / 0.21))
    assert 0.4e6 < critical_batch(FAMILY["52M"]["loss"]) < 0.6e6  # the family trained with 512 x 1024
    assert learning_rate(85e6) == pytest.approx(0.003239 - 0.0001395 * math.log(85e6))
    assert learning_rate(2e10) is None


@pytest.mark.parametrize("target", [1e6, 25e6, 124e6, 1.5e9, 6e9, 7e10])
@pytest.mark.parametrize("counting", ["all", "non-embedding"])
def test_shapes_are_near_their_size_and_usual(target, counting):
    if counting == "all" and target < 10e6:
        target = 10e6  # an embedding of 50,257 x 64 alone has 3M
    shape = shape_for(target, counting, 50257, 1024)
    count = shape.parameters if counting == "all" else shape.blocks
    assert count == pytest.approx(target, rel=0.25 if target < 1e7 else 0.08)
    assert shape.d_model % 64 == 0
    assert 30 < shape.d_model / shape.n_layers < 200


@pytest.mark.parametrize(("layers", "d"), [(3, 128), (12, 768)])
def test_a_shapes_counts_are_those_of_the_models(layers, d):
    gpt2 = GPT2Config(n_layers=layers, d_model=d, n_heads=d // 64)
    gptj = GPTJConfig(n_layers=layers, d_model=d, n_heads=d // 64, vocab_size=1000, rotary_dim=32)
    for config, positions in ((gpt2, gpt2.n_positions), (gptj, 0)):
        shape = ModelShape(n_layers=layers, d_model=d, vocab=config.vocab_size, positions=positions)
        shapes = parameter_shapes(config)
        counted = count_parameters(shapes, config.vocab_size)
        assert (shape.parameters, shape.blocks) == (counted.total, counted.blocks)
        assert shape.flops_per_token(256) == flops_per_token(shapes, config.vocab_size, 256)


TRUE = Parametric(name="true", E=1.7, A=400.0, B=900.0, alpha=0.35, beta=0.37)


def points_of(law, noise, seed=0, runs=6, each=8):
    rng = np.random.default_rng(seed)
    sizes = np.repeat(np.geomspace(1e6, 3e8, runs), each)
    tokens = sizes * np.tile(np.geomspace(2, 80, each), runs)
    loss = np.array([law.loss(n, d) for n, d in zip(sizes, tokens, strict=True)])
    run = np.repeat(np.arange(runs), each)
    return Points(parameters=sizes, tokens=tokens, loss=loss * np.exp(noise * rng.normal(size=len(loss))), run=run)


def test_a_fit_finds_the_law_that_made_the_points():
    found = fit(points_of(TRUE, 0.0), resamples=3)
    for name in ("E", "alpha", "beta"):
        assert getattr(found.law, name) == pytest.approx(getattr(TRUE, name), rel=1e-3)
    assert found.residual < 1e-6
    assert found.law.loss(6e9, 1.2e11) == pytest.approx(TRUE.loss(6e9, 1.2e11), rel=1e-4)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    hits = 0
    for seed in range(6):
        found = fit(points_of(TRUE, 0.005, seed), resamples=40, seed=seed)
        low, high = found.interval(1e9, 2e10)
        assert low < found.law.loss(1e9, 2e10) < high or high - low < 0.05
        hits += low < TRUE.loss(1e9, 2e10) < high
    assert hits >= 4
    assert found.interval_of("E")[0] < found.law.E < found.interval_of("E")[1]


def test_the_derivatives_of_the_fit_are_right():
    points = points_of(TRUE, 0.01)
    logs = np.log(np.stack([points.parameters, points.tokens, points.loss]))
    for theta in (np.array([6.0, 7.0, 0.5, 0.35, 0.37]), np.array([3.0, 8.0, -0.5, 0.2, 0.5])):
        numeric = approx_derivative(lambda x: _log_loss(x, logs), theta)
        np.testing.assert_allclose(_jacobian(theta, logs), numeric, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"loss": p.loss * np.nan}, "positive and finite"),
        (lambda p: {"tokens": p.tokens * 0}, "positive and finite"),
        (lambda p: {"parameters": p.parameters * 0 + 1e6}, "at least 3 sizes"),
        (
            lambda p: {name: getattr(p, name)[:5] for name in ("parameters", "tokens", "loss", "run")},
            "at least 6 points",
        ),
    ],
)
def test_too_little_to_fit_is_refused(change, message):
    import dataclasses

    points = points_of(TRUE, 0.0)
    with pytest.raises(ValueError, match=message):
        fit(dataclasses.replace(points, **change(points)))


def test_importing_it_brings_neither_jax_nor_scipy():
    code = "import sys, meshgpt.planning.scaling_laws; sys.exit('jax' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
