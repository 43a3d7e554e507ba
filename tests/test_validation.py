"""What a run measures on its way, and that it changes nothing of the run."""

import json
import math
from pathlib import Path

import eval_peers
import pytest
import runs
from runs import Here, Workshop

from meshgpt.config import Evals, Run, from_json, may_differ, to_json
from meshgpt.errors import UserError

CHOICES = [{"ctx": f"def f{n}(x):", "endings": ["return x", "pass", f"x = {n}"], "label": n % 3} for n in range(8)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, workshop: Workshop) -> Path:
    folder = tmp_path_factory.mktemp("data")
    eval_peers.write_lines(folder / "choices.jsonl", CHOICES)
    tasks = folder / "tasks"
    tasks.mkdir()
    eval_peers.local_task(tasks, "local_sciq", "sciq/sciq.yaml", "validation", eval_peers.sciq_rows(6))
    runs.make_store(
        folder / "whole", workshop.texts / "enum.txt", tokenizer=str(workshop.store / "tokenizer"), val_fraction=0.0
    )
    return folder


@pytest.mark.slow
def test_a_run_measures_what_is_named_and_learns_as_without(
    workshop: Workshop, here: Here, finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    eval_peers.only_local_tasks(monkeypatch)
    run = tmp_path / "run"
    ended = here.train(
        workshop.recipe(tmp_path), "--run-dir", run, "--eval-batches", 0, "--log-every", 4,
        "--evals.every", 6, "--evals.stores", f"own={workshop.store}", f"whole={data / 'whole'}",
        "--evals.choices", data / "choices.jsonl", "--evals.tasks", "local_sciq",
        "--evals.tasks-path", data / "tasks", "--evals.limit", 5,
    )  # fmt: skip
    assert ended.code == 0, ended
    assert "eval/local_sciq/acc" in ended.out
    rows = {row["step"]: row for row in runs.rows(run)}
    named = {
        *(f"val/{name}/{figure}" for name in ("own", "whole") for figure in ("loss", "perplexity", "bits_per_byte")),
        *(f"eval/{name}/{figure}" for name in ("choices", "local_sciq") for figure in ("acc", "acc_norm")),
    }
    ends = (f"{metric}_{end}" for metric in ("acc", "acc_norm") for end in ("low", "high"))
    marks = ("limited_to", "limited_of", *ends)
    named |= {f"eval/{name}/{mark}" for name in ("choices", "local_sciq") for mark in marks}
    assert "(a try: 5 of " in ended.out
    for step, row in rows.items():
        measured = {key for key in row if key.startswith(("val/", "eval/"))}
        assert measured == (named if step in (6, 12, 18, 20) else set()), step
    last = rows[20]
    assert last["val/own/loss"] == last["val_loss"]
    assert last["val/own/bits_per_byte"] == last["val_bits_per_byte"]
    assert last["val/own/perplexity"] == pytest.approx(math.exp(last["val_loss"]))
    assert last["val/whole/loss"] != last["val_loss"]
    assert rows[6]["val/own/loss"] > last["val/own/loss"]
    usual = {row["step"]: row["loss"] for row in runs.rows(finished)}
    assert [row["loss"] for row in rows.values() if "loss" in row] == pytest.approx(
        [usual[step] for step, row in rows.items() if "loss" in row], rel=2e-5
    )

    again = here.cli("eval", run, "--choices", data / "choices.jsonl", "--tasks", "local_sciq", "--tasks-path",
                     data / "tasks", "--limit", 5, "--out", tmp_path / "again.json")  # fmt: skip
    assert again.code == 0, again
    kept, later = (json.loads(p.read_text())["results"] for p in (run / "evals" / "20.json", tmp_path / "again.json"))
    for task in ("choices", "local_sciq"):
        for figure in ("acc", "acc_norm", "acc_stderr"):
            assert kept[task][f"{figure},none"] == pytest.approx(later[task][f"{figure},none"])
        assert last[f"eval/{task}/acc"] == kept[task]["acc,none"]
    assert here.cli("report", run).code == 0
    card, page = ((run / "report" / name).read_text() for name in ("README.md", "report.html"))
    for name in ("local_sciq", "choices", "whole"):
        assert name in card
        assert name in page


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--evals.stores", "x={data}/gone"), "gone"),
        (("--evals.choices", "{data}/gone.jsonl"), "gone.jsonl is no file"),
        (("--evals.choices", "{data}/choices.jsonl", "{data}/choices.jsonl"), "two files have one name"),
        (("--evals.choices", "{data}/long.jsonl"), "tokens, and the model's context is 32: it cannot be scored"),
        (("--evals.stores", "x={data}/other"), "tokenizer"),
        (("--evals.stores", "here"), "--evals.stores 'here': give NAME=FOLDER"),
        (("--evals.every", "-1"), "--evals.every -1: this cannot be negative"),
    ],
)
def test_what_is_not_there_is_refused_before_the_first_step(
    workshop: Workshop, here: Here, data: Path, tmp_path: Path, flags: tuple[str, ...], said: str
):
    eval_peers.write_lines(data / "long.jsonl", [{"ctx": "a", "endings": ["b", "the " * 40], "label": 0}])
    if "other" in flags[1] and not (data / "other").exists():
        runs.make_store(
            data / "other", workshop.texts / "enum.txt", train_tokenizer="bpe", vocab_size=300, val_fraction=0.0
        )
    flags = tuple(flag.format(data=data) for flag in flags)
    here.train(workshop.recipe(tmp_path), "--run-dir", tmp_path / "run", *flags).refused(said)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("stores", [("a b=x",), ("=x",), ("a=",), ("a/b=x",), ("a=x", "a=y")])
def test_stores_need_names_of_their_own(stores: tuple[str, ...]):
    with pytest.raises(UserError, match=r"--evals\.stores"):
        Evals(stores=stores)


def test_what_is_measured_may_change_when_a_run_goes_on_and_an_old_record_is_read(finished: Path):
    assert may_differ("evals.tasks")
    record = json.loads((finished / "run.json").read_text())["run"]
    assert to_json(from_json(Run, record)) == record
    del record["evals"]
    assert from_json(Run, record).evals == Evals()
