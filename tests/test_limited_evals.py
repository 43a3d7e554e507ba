"""A limited evaluation is a try: marked as one wherever it is shown, with its interval, and no result for the hub."""

import dataclasses
import io
import json
import math
from pathlib import Path

import fake_run
import numpy as np
import pytest
import scipy.stats
import yaml
from rich.console import Console as RichConsole

from meshgpt.config import Evals
from meshgpt.data.pipeline import EvalBatches
from meshgpt.data.prepare import Prepare, prepare
from meshgpt.evals import results
from meshgpt.evals.choices import Accuracy
from meshgpt.evals.intervals import bootstrap, ratio_interval, wilson
from meshgpt.evals.perplexity import Perplexity
from meshgpt.report.blocks import to_markdown
from meshgpt.report.card import CardOptions, card
from meshgpt.report.evals import read_evals
from meshgpt.report.facts import read_facts
from meshgpt.report.front_matter import front_matter
from meshgpt.report.html import page
from meshgpt.report.panels import panels
from meshgpt.report.tables import comparison
from meshgpt.training.finish import summary
from meshgpt.training.run_folder import RunFolder
from meshgpt.training.trackers import Console

TRY = results.of_choices("hellaswag", Accuracy(acc=1.0, acc_norm=1.0, questions=2), 50)
ALL = results.of_choices("hellaswag", Accuracy(acc=1.0, acc_norm=0.98, questions=50), 50)
CUT = {"val_tokens": 4096.0, "val_tokens_of": 90000.0, "val_loss_low": 2.5, "val_loss_high": 3.5}


def measured(texts: int, seed: int = 0) -> Perplexity:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(50, 400, texts).astype(float)
    nats = tokens * rng.normal(4.0, 0.5, texts)
    parts = np.array([nats, tokens, tokens / 1.5, tokens * 4]).T
    sums = [float(column.sum()) for column in parts.T]
    return Perplexity(
        nats=sums[0], tokens=int(sums[1]), words=int(sums[2]), bytes=int(sums[3]), documents=texts, by_document=parts
    )


def shown(folder: Path) -> tuple[str, str]:
    """(the card, its front matter)."""
    facts = read_facts(folder)
    return to_markdown(card(facts, panels([facts]), CardOptions()), "plots"), front_matter(facts, CardOptions())


def indexed(front: str) -> dict[tuple[str, str], float]:
    """What the hub would show, by (data set, metric)."""
    found = yaml.safe_load(front[4:-4]).get("model-index", [{"results": []}])[0]["results"]
    return {(one["dataset"]["type"], metric["type"]): metric["value"] for one in found for metric in one["metrics"]}


@pytest.mark.parametrize("count", [1, 2, 7, 50, 1000, 10**6])
def test_wilson_is_scipys(count: int) -> None:
    for right in {0, 1, count // 3, count // 2, count - 1, count}:
        theirs = scipy.stats.binomtest(right, count).proportion_ci(method="wilson")
        assert wilson(right / count, count) == pytest.approx((theirs.low, theirs.high), rel=1e-12, abs=1e-14)


def test_the_bootstrap_is_scipys_within_what_resampling_leaves_open() -> None:
    rng = np.random.default_rng(3)
    above, below = rng.gamma(3.0, 100.0, 80), rng.integers(20, 200, 80).astype(float)
    theirs = scipy.stats.bootstrap(
        (above, below), lambda a, b: a.sum() / b.sum(), paired=True, vectorized=False, method="percentile",
        n_resamples=4000, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    found = ratio_interval(above, below)
    assert found is not None
    width = theirs.high - theirs.low
    assert found == pytest.approx((theirs.low, theirs.high), abs=0.08 * width)
    assert ratio_interval(above[:1], below[:1]) is None
    assert bootstrap(5, lambda indices: 2.0) == (2.0, 2.0)


def test_a_try_is_marked_in_the_file_the_table_and_the_metrics(tmp_path: Path) -> None:
    wiki = results.of_perplexity("wiki", measured(20), 400)
    found = results.merged(TRY, wiki)
    results.save(tmp_path / "8.json", found)
    content = json.loads((tmp_path / "8.json").read_text())
    assert content["n-samples"] == {
        "hellaswag": {"original": 50, "effective": 2},
        "wiki": {"original": 400, "effective": 20},
    }
    low, high = scipy.stats.binomtest(2, 2).proportion_ci(method="wilson")
    assert content["intervals"]["hellaswag"]["acc,none"] == pytest.approx([low, high])
    below, above = content["intervals"]["wiki"]["token_perplexity,none"]
    assert below < content["results"]["wiki"]["token_perplexity,none"] < above
    table = results.table(found)
    assert "1.0000  (a try: 2 of 50; 95%: 0.3424 to 1.0000)" in table
    assert "(a try: 20 of 400; 95%: " in table
    assert "±" not in table
    logged = results.metrics(found)
    assert (logged["eval/hellaswag/limited_to"], logged["eval/hellaswag/limited_of"]) == (2, 50)
    from_file, from_metrics = read_evals(tmp_path, [])[0], read_evals(tmp_path / "none", [{"step": 8, **logged}])[0]
    assert len(from_file) == len(from_metrics) == 6
    for one, other in zip(from_file, from_metrics, strict=True):
        assert (str(one), one.limited, one.part) == (str(other), True, other.part)


@pytest.mark.parametrize("metrics_only", [False, True])
def test_a_try_is_marked_in_the_card_and_the_page_and_is_no_result_for_the_hub(tmp_path: Path, metrics_only: bool):
    rows = list(fake_run.rows())
    if metrics_only:
        rows[-1] |= results.metrics(TRY)
    folder = fake_run.write(tmp_path / "tried", figures=rows, evals=None if metrics_only else {100: TRY})
    markdown, front = shown(folder)
    assert "100.00% (a try: 2 of 50; 95%: 34.24 to 100.00)" in markdown
    assert "± 0.00" not in markdown
    assert "measured here, step" not in markdown
    assert {name for name, _ in indexed(front)} == {"held-out"}
    facts = read_facts(folder)
    html = page("tried", card(facts, panels([facts]), CardOptions()), panels([facts]))
    assert "(a try: 2 of 50; 95%: 34.24 to 100.00)" in html
    assert "hellaswag acc (a try: 2 of 50)" in html  # the name of its curve
    assert "(a try: 2 of 50" in to_markdown(comparison([facts, facts], CardOptions().energy), "")


def test_a_whole_evaluation_near_0_or_1_has_an_interval_and_is_a_result(tmp_path: Path) -> None:
    markdown, front = shown(fake_run.write(tmp_path / "whole", evals={100: ALL}))
    assert "100.00% (95%: 92.87 to 100.00)" in markdown
    assert "98.00% (95%: 89.50 to 99.65)" in markdown
    assert "± 0.00" not in markdown
    assert "a try" not in markdown
    assert indexed(front)["hellaswag", "acc"] == 1.0
    assert "1.0000  (95%: 0.9287 to 1.0000)" in results.table(ALL)
    # As the harness wrote it: no intervals, and a standard error of 0.
    theirs = {key: value for key, value in ALL.items() if key != "intervals"}
    assert "100.00% (95%: 92.87 to 100.00)" in shown(fake_run.write(tmp_path / "theirs", evals={100: theirs}))[0]
    bare = theirs | {"n-samples": {}}
    assert "| **100.00%** |" in shown(fake_run.write(tmp_path / "bare", evals={100: bare}))[0]


def test_a_run_of_before_the_marks_is_a_try_where_it_had_a_limit(tmp_path: Path) -> None:
    old = {key: value for key, value in TRY.items() if key != "intervals"}
    old["n-samples"] = {"hellaswag": {"original": 2, "effective": 2}}  # of the questions that were left
    config = dataclasses.replace(fake_run.run(), evals=Evals(limit=2), eval_batches=3)
    rows = [row | ({"eval/other/acc": 0.5} if row["step"] == 100 else {}) for row in fake_run.rows()]
    markdown, front = shown(fake_run.write(tmp_path / "old", config, figures=rows, evals={100: old}))
    assert "(a try: the first 2; 95%: 34.24 to 100.00)" in markdown
    assert "Held-out text (a try: the first 1,536 tokens)" in markdown  # 3 batches of 8 x 64
    assert not indexed(front)
    # All questions of a file that has just as many are no try, and the file says so.
    whole = results.of_choices("hellaswag", Accuracy(acc=0.5, acc_norm=0.5, questions=2), 2)
    _, front = shown(fake_run.write(tmp_path / "new", config, evals={100: whole}))
    assert indexed(front)["hellaswag", "acc"] == 0.5


def test_a_group_with_a_limited_task_is_a_try() -> None:
    found = {
        "results": {"both": {"acc,none": 0.5}, "one": {"acc,none": 1.0}, "two": {"acc,none": 0.0}},
        "group_subtasks": {"both": ["one", "two"], "one": [], "two": []},
        "n-samples": {"one": {"original": 9, "effective": 3}, "two": {"original": 3, "effective": 3}},
    }
    part = results.part_of(found, "both")
    assert part is not None
    assert (part.used, part.of, part.limited) == (6, 12, True)


def test_a_held_out_text_that_is_cut_is_a_try(tmp_path: Path) -> None:
    rows = [row | (CUT | {"val/wiki/loss": 3.0, "val/wiki/tokens": 512.0, "val/wiki/tokens_of": 700.0})
            if "val_loss" in row else row for row in fake_run.rows()]  # fmt: skip
    folder = fake_run.write(tmp_path / "cut", figures=rows)
    markdown, front = shown(folder)
    assert "Held-out text (a try: 4,096 of 90,000 tokens)" in markdown
    assert "(95%: 12.18 to 33.12)" in markdown  # perplexity: exp of the ends
    assert not indexed(front)
    assert "3.0000 (a try: 512 of 700 tokens" in markdown
    facts = read_facts(folder)
    labels = [series.label for panel in panels([facts]) for series in panel.series]
    assert "validation (a try: 4,096 of 90,000 tokens)" in labels
    assert "wiki (a try: 512 of 700 tokens)" in labels
    assert "(a try: 4,096 of 90,000 tokens" in to_markdown(comparison([facts, facts], CardOptions().energy), "")
    assert "(a try: 4,096 of 90,000 tokens" in summary(fake_run.run(), RunFolder(folder))
    whole = [
        row | ({"val_tokens": 700.0, "val_tokens_of": 700.0} if "val_loss" in row else {}) for row in fake_run.rows()
    ]
    markdown, front = shown(fake_run.write(tmp_path / "whole", figures=whole))
    assert "a try" not in markdown
    assert ("held-out", "perplexity") in indexed(front)


def test_the_console_marks_tries() -> None:
    out = io.StringIO()
    console = Console(100, console=RichConsole(file=out, width=300))
    console.log(20, {"val_loss": 3.0, **CUT, "val/w/loss": 2.0, "val/w/tokens": 5.0, "val/w/tokens_of": 9.0})
    console.log(20, results.metrics(TRY) | {"eval/full/acc": 0.25, "val/all/loss": 1.5})
    said = out.getvalue()
    assert "validation loss 3.0000 (a try: 4,096 of 90,000 tokens; 95%: 2.5000 to 3.5000)" in said
    assert "val/w/loss 2 (a try: 5 of 9 tokens)" in said
    assert "eval/hellaswag/acc 1 (a try: 2 of 50; 95%: 0.3424 to 1)" in said
    assert "eval/full/acc 0.25  val/all/loss 1.5" in said
    assert "limited_to" not in said
    assert "tokens_of" not in said


def test_bytes_of_a_part_of_a_mixture_are_those_of_its_documents(tmp_path: Path) -> None:
    """A loss of the first tokens is turned into bits by the bytes of these, not by those of the whole."""
    splits, tokenizer = [], {"train_tokenizer": "bpe", "vocab_size": 300}
    for name, words in (("plain", "word other "), ("odd", "Ωδ€ ζη ")):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": words * n}) + "\n" for n in range(3, 9)))
        request = Prepare(
            sources=(str(tmp_path / f"{name}.jsonl"),),
            out=str(tmp_path / name),
            val_fraction=0.0,
            workers=1,
            **tokenizer,
        )
        splits.append(prepare(request, lambda label, done, total: None).split("train"))
        tokenizer = {"tokenizer": str(tmp_path / "plain" / "tokenizer")}
    batches = EvalBatches(splits=tuple(splits), seq_len=16, global_batch=2)
    first = splits[0]
    for split, base, before in ((first, 0, 0), (splits[1], first.num_tokens, first.num_bytes)):
        for number in range(split.num_documents):
            start, stop = split.document_range(number)
            sizes = split.documents["bytes"][: number + 1].tolist()
            assert batches.bytes_of(base + stop) == before + sum(sizes)
            half = before + sum(sizes[:-1]) + sizes[-1] * (start + (stop - start) // 2 - start) / (stop - start)
            assert batches.bytes_of(base + start + (stop - start) // 2) == pytest.approx(half)
    assert batches.bytes_of(batches.num_tokens) == batches.num_bytes
    share = [split.num_tokens / split.num_bytes for split in splits]
    assert not math.isclose(*share, rel_tol=0.2), "the two must differ for this to show anything"
