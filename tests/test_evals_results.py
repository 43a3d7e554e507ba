"""Results in the harness's form: kept, added to, and read by the report."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from meshgpt.errors import UserError
from meshgpt.evals import results
from meshgpt.evals.choices import Accuracy
from meshgpt.evals.intervals import Part
from meshgpt.evals.perplexity import Perplexity
from meshgpt.report.evals import Result, read_evals

HARNESS = {
    "results": {
        "arc": {
            "alias": "arc", "name": "arc", "sample_len": 4, "acc,none": np.float64(0.25), "acc_stderr,none": "N/A",
            "exact_match,strict": 0.5, "bleu,none": math.nan,
        }
    },
    "n-shot": {"arc": 5},
    "higher_is_better": {"arc": {"acc": True}},
    "n-samples": {"arc": {"original": 9, "effective": 4}},
    "configs": {"arc": {"process": len, "numbers": (1, np.int64(2))}},
    "date": 1.5,
}  # fmt: skip
CHOSEN = results.of_choices("mine", Accuracy(acc=0.75, acc_norm=0.5, questions=4))
READ = results.of_perplexity("wiki", Perplexity(nats=20.0, tokens=10, words=5, bytes=40, documents=2))


def test_what_was_kept_is_added_to_and_replaced_by_task(tmp_path: Path) -> None:
    path = tmp_path / "evals" / "20.json"
    for found in (HARNESS, CHOSEN, READ, results.of_choices("mine", Accuracy(acc=1.0, acc_norm=1.0, questions=2))):
        results.save(path, found)
    content = json.loads(path.read_text())
    assert set(content["results"]) == {"arc", "mine", "wiki"}
    assert content["results"]["mine"]["acc,none"] == 1.0
    assert content["n-samples"]["mine"] == {"original": 2, "effective": 2}
    assert content["results"]["arc"]["bleu,none"] is None
    assert content["configs"]["arc"]["numbers"] == [1, 2]
    assert content["date"] == 1.5


def test_the_report_reads_them(tmp_path: Path) -> None:
    for found in (HARNESS, CHOSEN, READ):
        results.save(tmp_path / "20.json", found)
    read, unread = read_evals(tmp_path, [])
    assert not unread
    by_name = {(result.task, result.metric): result for result in read}
    part = Part(used=4, of=9)
    expected = Result(step=20, task="arc", metric="acc", value=0.25, shots=5, better_up=True, part=part)
    assert by_name["arc", "acc"] == expected
    assert by_name["arc", "exact_match (strict)"].value == 0.5
    assert by_name["mine", "acc"].stderr == pytest.approx(0.25)
    assert by_name["mine", "acc_norm"].better_up is True
    assert by_name["wiki", "word_perplexity"].value == pytest.approx(math.exp(4))
    assert by_name["wiki", "bits_per_byte"].better_up is False
    assert len(read) == 8


def test_metrics_are_those_that_the_report_knows(tmp_path: Path) -> None:
    found = results.merged(results.merged(HARNESS, CHOSEN), READ)
    metrics = results.metrics(found)
    assert metrics.keys() == {
        *("eval/arc/acc", "eval/arc/exact_match (strict)", "eval/mine/acc", "eval/mine/acc_norm"),
        *("eval/arc/limited_to", "eval/arc/limited_of"),
        *("eval/wiki/token_perplexity", "eval/wiki/word_perplexity", "eval/wiki/byte_perplexity"),
        "eval/wiki/bits_per_byte",
    }
    results.save(tmp_path / "3.json", found)
    in_file = {(result.task, result.metric): result.value for result in read_evals(tmp_path, [])[0]}
    in_metrics = {
        (result.task, result.metric): result.value for result in read_evals(tmp_path, [{"step": 3, **metrics}])[0]
    }
    assert in_file == in_metrics


def test_a_table_for_a_reader() -> None:
    lines = results.table(results.merged(CHOSEN, READ)).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["task", "metric", "value"],
        ["mine", "acc", "0.7500", "±", "0.2500"],
        ["mine", "acc_norm", "0.5000", "±", "0.2887"],
    ]
    assert lines[3].split() == ["wiki", "token_perplexity", "7.3891"]


@pytest.mark.parametrize("content", ["", "[]", '{"results": 3}', "{"])
def test_another_file_is_not_overwritten(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"mine\.json holds no results of an evaluation: move it aside"):
        results.save(path, CHOSEN)
    assert path.read_text() == content
