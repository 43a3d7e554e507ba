"""`meshgpt plan`: budgets as tables, fits of runs' folders, predictions against what came out, and bad input."""

import dataclasses
import json
import re

import fake_run
import pytest

from meshgpt.cli.plan import plan
from meshgpt.errors import UserError
from meshgpt.models import flops
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.optim.config import AdamW, Constant
from meshgpt.planning.budget import Budget, describe, rows
from meshgpt.planning.fit import fitted, measured, predict
from meshgpt.planning.scaling_laws import BESIROGLU, HOFFMANN, KAPLAN, Parametric
from meshgpt.report.write import read_runs

TRUE = Parametric(name="true", E=1.5, A=60.0, B=80.0, alpha=0.3, beta=0.32)
SIZES = ((2, 32), (2, 48), (3, 64), (4, 96), (4, 128))


def ladder_run(tmp_path, layers, width, constant=True, evaluations=20, noise=0.0, **written):
    """A run whose validation losses are those of TRUE at its blocks' parameters."""
    model = GPT2Config(vocab_size=300, n_positions=64, n_layers=layers, n_heads=2, d_model=width)
    config = fake_run.run(model=model, steps=1000)
    if constant:
        config = dataclasses.replace(config, optim=AdamW(warmup_steps=10, schedule=Constant()))
    blocks = layers * (12 * width**2 + 13 * width)
    figures = []
    for index in range(1, evaluations + 1):
        step = 1000 * index // evaluations
        loss = TRUE.loss(blocks, step * 512) * (1 + noise * (-1) ** (index + layers))
        figures.append({"step": step, "tokens": step * 512, "loss": loss, "val_loss": loss})
    figures = written.pop("figures", figures)
    return fake_run.write(tmp_path / f"n{layers}-{width}", config, figures=figures, **written)


def test_a_budget_of_operations_asks_each_law_and_shows_the_spread():
    found = rows(Budget(flops=1e20))
    assert [row.choice for row in found] == [law.of_flops(1e20) for law in (KAPLAN, HOFFMANN, BESIROGLU)]
    text = describe(Budget(flops=1e20))
    for name in ("Kaplan et al. 2020", "Hoffmann et al. 2022, approach 3", "Besiroglu et al. 2024"):
        assert name in text
    low, high = re.findall(r"perplexity ([\d.]+) to ([\d.]+), a factor of", text)[0]
    assert (float(low), float(high)) == pytest.approx((12.85, 15.15), abs=0.06)
    assert "hours" not in text


def test_a_budget_of_hours_is_spent_on_the_whole_step():
    budget = Budget(hours=8, hardware="8xA100", price=1.5)
    for row in rows(budget):
        assert row.hours == pytest.approx(8, rel=0.03)
        config = GPT2Config(n_layers=row.shape.n_layers, d_model=row.shape.d_model, n_heads=row.shape.n_heads)
        from meshgpt.models.model import parameter_shapes

        exact = flops.flops_per_token(parameter_shapes(config), config.vocab_size, 1024) * row.choice.tokens
        assert exact / (8 * 312e12 * 0.4) / 3600 == pytest.approx(row.hours)
    assert re.search(r"cost\s+\$9[5-8]\.\d\d", describe(budget))
    assert "a guess: give --price" in describe(Budget(hours=8, hardware="8xA100"))


def test_a_budget_of_tokens_is_used_up():
    assert all(row.choice.tokens == pytest.approx(3e9) for row in rows(Budget(tokens=3e9)))
    gptj = rows(Budget(tokens=3e9, family="gptj"))
    assert all(row.shape.positions == 0 for row in gptj)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give one budget"),
        ({"flops": 1e20, "tokens": 1e9}, "give one budget"),
        ({"flops": -1.0}, "--flops -1.0: give a number above 0"),
        ({"flops": float("nan")}, "--flops nan: give a finite number"),
        ({"hours": 8.0}, "of what"),
        ({"flops": 1e20, "utilisation": 1.5}, "--utilisation 1.5"),
        ({"flops": 1e20, "price": -2.0}, "--price -2.0"),
        ({"flops": 1e20, "vocab_size": 0}, "--vocab-size 0"),
    ],
)
def test_impossible_budgets_are_refused(fields, message):
    with pytest.raises(UserError, match=re.escape(message) if message[0] == "-" else message):
        Budget(**fields)


def test_unknown_hardware_and_plans_are_named():
    with pytest.raises(UserError, match="known are V100"):
        describe(Budget(hours=1.0, hardware="8xZ9"))
    with pytest.raises(UserError, match="no plan 'budgets'"):
        plan(["budgets"])


def test_a_ladder_predicts_the_next_run_and_says_how_it_went(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jax.config.update", lambda *_: None)  # the tests' devices are in use
    paths = [str(ladder_run(tmp_path, *size, noise=0.002)) for size in SIZES]
    plot = tmp_path / "fit.png"
    arguments = ["fit", *paths[:4], "--predict", paths[4], "--plot", str(plot), "--resamples", "30"]
    plan(arguments)
    text = capsys.readouterr().out
    predicted, low, high = (float(x) for x in re.findall(r"predicted ([\d.]+) nats \(([\d.]+) to ([\d.]+)\)", text)[0])
    truth = TRUE.loss(4 * (12 * 128**2 + 13 * 128), 512_000)
    assert predicted == pytest.approx(truth, rel=0.01)
    assert low <= predicted <= high
    actual = float(re.findall(r"actual ([\d.]+) nats", text)[0])
    assert actual == pytest.approx(truth, rel=0.003)
    error, side = re.findall(r"the prediction is ([\d.]+)% too (high|low)", text)[0]
    assert (1 if side == "high" else -1) * float(error) / 100 == pytest.approx(predicted / actual - 1, abs=1e-4)
    assert "the next size, N" in text
    assert plot.stat().st_size > 10_000


def test_points_along_a_run_count_only_with_a_constant_rate(tmp_path):
    constant = read_runs([ladder_run(tmp_path / "a", 2, 32)])
    cosine = read_runs([ladder_run(tmp_path / "b", 2, 48, constant=False)])
    assert measured(constant, "auto", "all").tokens.tolist() == [50 * i * 512 for i in range(4, 21)]
    assert measured(cosine, "auto", "all").tokens.tolist() == [512_000]
    assert measured(constant, "final", "all").parameters[0] == constant[0].parameters.total
    assert measured(constant, "final", "non-embedding").parameters[0] == 2 * (12 * 32**2 + 13 * 32)


def test_a_run_in_progress_is_predicted_and_not_judged(tmp_path):
    runs = read_runs([ladder_run(tmp_path, *size) for size in SIZES[:4]])
    found = fitted(measured(runs, "auto", "non-embedding"), 20)
    begun = [{"step": 100, "tokens": 51_200, "loss": 4.0, "val_loss": 4.0}]
    (coming,) = read_runs([ladder_run(tmp_path, 4, 128, figures=begun)])
    made = predict(found, coming, "non-embedding")
    assert made.actual is None
    assert made.tokens == 512_000
    assert made.loss == pytest.approx(TRUE.loss(made.parameters, 512_000), rel=0.01)


def test_runs_that_cannot_be_fitted_are_named(tmp_path):
    silent = ladder_run(tmp_path, 2, 32, figures=[{"step": 5, "loss": 3.0, "val_loss": None}])
    with pytest.raises(UserError, match=r"n2-32 has no validation loss: evaluate it as it trains"):
        measured(read_runs([silent]), "auto", "all")
    few = read_runs([ladder_run(tmp_path, *size, constant=False) for size in SIZES[1:]])
    with pytest.raises(UserError, match=r"cannot fit a law to 4 losses of 4 sizes: five constants take at least 6"):
        fitted(measured(few, "auto", "all"), 20)
    other = ladder_run(tmp_path / "other", 2, 48)
    lines = [
        json.loads(line) | {"gzip_bits_per_byte": 2.0} for line in (other / "metrics.jsonl").read_text().splitlines()
    ]
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="different held-out texts"):
        measured(read_runs([other, tmp_path / "n4-128"]), "auto", "all")
