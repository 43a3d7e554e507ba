"""Losses per token are compared only between runs of one tokenizer and one held-out text."""

import dataclasses
import json
import math
import re
from pathlib import Path

import eval_peers
import fake_run
import pytest

from meshgpt.data.tokenizer import train_bpe
from meshgpt.errors import UserError
from meshgpt.planning import fit
from meshgpt.report.blocks import to_markdown
from meshgpt.report.card import CardOptions
from meshgpt.report.panels import panels
from meshgpt.report.write import document, read_runs
from meshgpt.report.yardstick import other_text, other_tokens
from meshgpt.sweep.runner import incomparable
from meshgpt.sweep.trials import Plan, Sweep, Trial
from meshgpt.training.run_folder import RunFolder


def made(folder: Path, loss: float, bytes_per_token: float | None = None, gzip: float | None = 2.5, **more) -> Path:
    """A run whose last evaluation is this one."""
    row = {"step": 100, "tokens": 51200, "loss": loss, "val_loss": loss}
    row |= {} if gzip is None else {"gzip_bits_per_byte": gzip}
    row |= {} if bytes_per_token is None else {"val_bits_per_byte": loss / math.log(2) / bytes_per_token}
    return fake_run.write(folder, figures=[row | more])


def ledger(folder: Path, tokenizer: str, held_out: str = "5 documents") -> Path:
    RunFolder(folder).ledger.write_text(json.dumps([{"name": "", "tokenizer": tokenizer, "held_out": held_out}]))
    return folder


def with_tokenizer(folder: Path, size: int) -> Path:
    """As a run of before: the tokenizer is nowhere but in its folder."""
    train_bpe([eval_peers.sentence(seed, 20) for seed in range(80)], size).save(RunFolder(folder).tokenizer)
    return folder


PAIRS = {
    "ledger": lambda at: (ledger(made(at / "a", 3.0), "x"), ledger(made(at / "b", 4.0), "y")),
    "folder": lambda at: (with_tokenizer(made(at / "a", 3.0), 300), with_tokenizer(made(at / "b", 4.0), 320)),
    "lengths": lambda at: (made(at / "a", 3.0, 3.1), made(at / "b", 4.0, 4.4)),
}
TEXTS = {
    "gzip": lambda at: (made(at / "a", 3.0, gzip=2.4), made(at / "b", 4.0, gzip=2.6)),
    "ledger": lambda at: (ledger(made(at / "a", 3.0), "x"), ledger(made(at / "b", 4.0), "x", "6 documents")),
    "part": lambda at: (made(at / "a", 3.0, val_tokens=9.0, val_tokens_of=99.0),
                        made(at / "b", 4.0, val_tokens=18.0, val_tokens_of=99.0)),
}  # fmt: skip


def test_a_law_is_not_fitted_to_two_tokenizers(tmp_path: Path) -> None:
    for name, pair in PAIRS.items():
        runs = read_runs(pair(tmp_path / name))
        with pytest.raises(
            UserError, match=r"b has (another tokenizer|other tokens .*) than a: .* one law cannot hold"
        ):
            fit.measured(runs, "final", "all")
    for name, pair in TEXTS.items():
        with pytest.raises(UserError, match=r"different held-out texts"):
            fit.measured(read_runs(pair(tmp_path / f"text-{name}")), "final", "all")
    same = [ledger(made(tmp_path / f"{n}", 3.0 + n, 3.1), "x") for n in range(3)]
    assert len(fit.measured(read_runs(same), "final", "all").loss) == 3
    assert len(fit.measured(read_runs([*same, made(tmp_path / "unknown", 3.0)]), "final", "all").loss) == 4


def test_a_run_of_another_tokenizer_is_not_predicted(tmp_path: Path) -> None:
    same = [ledger(made(tmp_path / f"{n}", 3.0 + n, 3.1), "x") for n in range(3)]
    other = ledger(made(tmp_path / "next", 3.0, 3.1), "y")
    with pytest.raises(UserError, match="next has another tokenizer than 0"):
        fit.command([*map(str, same), "--predict", str(other)])


@pytest.mark.parametrize("kind", PAIRS)
def test_a_comparison_of_two_tokenizers_goes_by_bits_per_byte(tmp_path: Path, kind: str) -> None:
    first, second = PAIRS[kind](tmp_path)
    rows = json.loads(RunFolder(second).metrics.read_text())
    RunFolder(second).metrics.write_text(json.dumps(rows | {"val_bits_per_byte": 1.1}) + "\n")
    rows = json.loads(RunFolder(first).metrics.read_text())
    RunFolder(first).metrics.write_text(json.dumps(rows | {"val_bits_per_byte": 1.2}) + "\n")
    runs = read_runs([first, second])
    text = to_markdown(document(runs, CardOptions())[1], "plots")
    assert text.count("Losses and perplexities per token are not comparable: b has") == 2
    assert "| **b** |" in text  # the lower loss is a's
    assert "| **a** |" not in text
    (losses,) = [panel for panel in panels(runs) if panel.slug == "loss_tokens"]
    assert "not comparable: b has" in losses.y_label


@pytest.mark.parametrize("kind", TEXTS)
def test_a_comparison_of_two_held_out_texts_has_no_best_run(tmp_path: Path, kind: str) -> None:
    text = to_markdown(document(read_runs(TEXTS[kind](tmp_path)), CardOptions())[1], "plots")
    assert "Not comparable: b has" in text
    assert "| **" not in text


def test_a_comparison_of_one_tokenizer_and_text_goes_by_the_loss(tmp_path: Path) -> None:
    runs = read_runs([ledger(made(tmp_path / name, loss, 3.1), "x") for name, loss in (("a", 4.0), ("b", 3.0))])
    text = to_markdown(document(runs, CardOptions())[1], "plots")
    assert "ot comparable" not in text
    assert "| **b** |" in text
    named = [(run.name, run.yardstick) for run in runs]
    assert (other_text(named), other_tokens(named)) == ("", "")


@pytest.mark.parametrize(
    ("metric", "tokens", "texts"),
    [("val_loss", True, True), ("loss", True, False), ("val_bits_per_byte", False, True), ("eval/x/acc", False, False),
     ("val/w/loss", True, True), ("eval/x/token_perplexity", True, False)],
)  # fmt: skip
def test_a_sweep_stops_where_its_metric_compares_nothing(
    tmp_path: Path, metric: str, tokens: bool, texts: bool
) -> None:
    for pairs, stops in ((PAIRS, tokens), (TEXTS, texts)):
        for name, pair in pairs.items():
            plan = Plan(recipe="r", fixed=(), axes=(), method="grid", count=2, seed=0, metric=metric, maximize=False)
            at = tmp_path / ("tokens" if pairs is PAIRS else "texts") / name
            sweep = Sweep(at / "sweep", plan)
            first, second = Trial(number=1, point=(), score=3.0), Trial(number=2, point=())
            sweep.trials = [first, second]
            (at / "sweep").mkdir(parents=True)
            for trial, folder in zip((first, second), pair(at), strict=True):
                folder.rename(sweep.run_dir(trial))
            said = incomparable(sweep, second)
            assert bool(said) == stops, (name, said)
            assert not said or re.match("trial-002 has .* than trial-001, and ", said)
            assert incomparable(sweep, dataclasses.replace(first)) == ""
