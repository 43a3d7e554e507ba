"""`meshgpt eval` on runs and folders, in one process and in several."""

import json
from pathlib import Path

import eval_peers
import pods
import pytest
import runs
from runs import Here, Workshop


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    eval_peers.write_lines(
        folder / "choices.jsonl",
        [
            {
                "ctx": f"def f{n}(x):" + " # of all the words a comment may have" * (n == 0),
                "endings": ["return x", "pass", f"x = {n}"],
                "label": n % 3,
            }
            for n in range(8)
        ],
    )
    eval_peers.write_lines(
        folder / "pages.jsonl",
        [{"text": f"import os\n\n\ndef name{n}():\n    return os.name\n" * (n + 1)} for n in range(6)],
    )
    tasks = folder / "tasks"
    tasks.mkdir()
    eval_peers.local_task(tasks, "local_sciq", "sciq/sciq.yaml", "validation", eval_peers.sciq_rows(6))
    return folder


def test_a_runs_results_go_to_its_folder_and_into_its_report(
    here: Here, finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    eval_peers.only_local_tasks(monkeypatch)
    run = runs.copied(finished, tmp_path / "run")
    ended = here.cli("eval", run, "--choices", data / "choices.jsonl", "--tasks", "local_sciq",
                     "--tasks-path", data / "tasks")  # fmt: skip
    assert ended.code == 0, ended
    assert f"{run}/evals/20.json holds them" in ended.out
    assert "log-likelihoods  24/24 (100%)  done in" in ended.out
    assert [line.split()[:2] for line in ended.out.splitlines() if line.startswith(("choices", "local_sciq"))] == [
        ["choices", "acc"], ["choices", "acc_norm"], ["local_sciq", "acc"], ["local_sciq", "acc_norm"]
    ]  # fmt: skip
    tried = here.cli("eval", run, "--choices", data / "choices.jsonl", "--limit", 2)
    assert "to keep these figures, give --out FILE" in tried.out  # and the whole result stays
    assert tried.out.count("(a try: 2 of 8; 95%: ") == 2
    out = tmp_path / "tried.json"
    read = here.cli("eval", run, "--perplexity", data / "pages.jsonl", "--limit", 2, "--out", out)
    assert read.out.count("(a try: 2 of 6; 95%: ") == 4
    assert json.loads(out.read_text())["n-samples"]["pages"] == {"original": 6, "effective": 2}
    later = here.cli("eval", run, "--perplexity", data / "pages.jsonl", "--stride", 8, "--step", 20)
    assert later.code == 0, later
    content = json.loads((run / "evals" / "20.json").read_text())
    assert set(content["results"]) == {"choices", "local_sciq", "pages"}
    assert content["n-samples"]["pages"]["effective"] == 6
    assert content["model_name"] == str(run)
    assert here.cli("report", run).code == 0
    card = (run / "report" / "README.md").read_text()
    assert "local_sciq" in card
    assert "word_perplexity" in card


def test_a_folder_gives_the_figures_of_its_run_where_they_are_asked_for(
    here: Here, finished: Path, data: Path, tmp_path: Path
):
    figures = []
    for source, mesh in ((finished, (8, 1)), (finished / "export", (2, 4))):
        out = tmp_path / f"{len(figures)}.json"
        ended = here.cli("eval", source, "--perplexity", data / "pages.jsonl", "--out", out,
                         "--mesh.data", mesh[0], "--mesh.fsdp", mesh[1])  # fmt: skip
        assert ended.code == 0, ended
        figures.append(json.loads(out.read_text())["results"]["pages"]["bits_per_byte,none"])
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)
    assert not (finished / "evals").exists()
    ended = here.cli("eval", finished / "export", "--choices", data / "choices.jsonl", "--limit", 1)
    assert "to keep these figures, give --out FILE" in ended.out
    assert "3 texts did not fit the context of 32 tokens" in ended.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "nothing to evaluate: give --tasks NAMES, --choices FILE or --perplexity FILE"),
        (("--tasks", " , "), "nothing to evaluate"),
        (("--choices", "gone.jsonl"), "gone.jsonl is no file"),
        (("--choices", "gone.jsonl", "--limit", "0"), "--limit 0: give at least 1"),
        (("--choices", "gone.jsonl", "--num-fewshot", "-1"), "--num-fewshot -1: give at least 0"),
        (("--choices", "gone.jsonl", "--stride", "5"), "--stride 5 is of --perplexity, which is not given"),
        (("--perplexity", "gone.txt", "--stride", "-5"), "these cannot be negative"),
        (("--perplexity", __file__, "--stride", "33"), "--stride 33: give 1 to the model's context of 32 tokens"),
        (("--perplexity", __file__, "--batch-size", "-1"), "--batch-size -1"),
        (("--perplexity", __file__, "--step", "7"), "keeps the checkpoints of steps [15, 20]"),
        (("--perplexity", __file__, __file__), "two files are called test_evals_command"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused(here: Here, finished: Path, arguments: tuple[str, ...], said: str):
    here.cli("eval", finished, *arguments).refused(said)


def test_what_is_no_results_is_refused_before_anything_is_measured(
    here: Here, finished: Path, data: Path, tmp_path: Path
):
    out = tmp_path / "notes.json"
    out.write_text("mine")
    ended = here.cli("eval", finished, "--choices", data / "choices.jsonl", "--out", out)
    ended.refused("notes.json holds no results of an evaluation: move it aside")
    assert "multiple choice" not in ended.out
    assert out.read_text() == "mine"


def test_no_model_is_refused(here: Here, data: Path, tmp_path: Path):
    here.cli("eval", tmp_path / "gone", "--choices", data / "choices.jsonl").refused("gone does not exist")


@pytest.mark.slow
def test_several_processes_give_the_same_figures_and_one_of_them_writes(
    workshop: Workshop, here: Here, finished: Path, data: Path, tmp_path: Path
):
    flags = ("--choices", data / "choices.jsonl", "--perplexity", data / "pages.jsonl", "--tasks", "local_sciq",
             "--tasks-path", data / "tasks", "--mesh.data", 2, "--mesh.fsdp", 2, "--mesh.tensor", 2)  # fmt: skip
    assert here.cli("eval", finished, *flags, "--out", tmp_path / "one.json").code == 0
    pod = pods.start(workshop, 2, 4, "eval", finished, *flags, "--out", tmp_path / "several.json", module="meshgpt.cli")
    first, second = pods.ended(pod)
    assert (first.code, second.code) == (0, 0), (first, second)
    assert "several.json holds them" in first.out
    assert "several.json" not in second.out
    one, several = (json.loads((tmp_path / f"{name}.json").read_text())["results"] for name in ("one", "several"))
    assert one.keys() == several.keys()
    for task, values in one.items():
        figures = {key: value for key, value in values.items() if isinstance(value, float)}
        assert figures == pytest.approx({key: several[task][key] for key in figures}, rel=1e-5)
