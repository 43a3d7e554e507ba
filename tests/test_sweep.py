"""Sweeps: what is tried, what is kept, what goes on after a kill, and what comes out."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from meshgpt import cli, recipe
from meshgpt.cli import sweep as command
from meshgpt.errors import UserError
from meshgpt.sweep import runner
from meshgpt.sweep.outcome import as_recipe
from meshgpt.sweep.space import at_random, grid, split
from meshgpt.sweep.trials import Plan, Sweep, Trial

RECIPE = """
from meshgpt.config import Data, Run, Samples
from meshgpt.data.prepare import Prepare
from meshgpt.models import GPT2Config
from meshgpt.optim import AdamW
def config():
    model = GPT2Config(vocab_size=300, n_layers=1, d_model=16, n_heads=2, n_positions=16)
    prepare = Prepare(sources=({text!r},), out="", train_tokenizer="bpe", vocab_size=300, val_fraction=0.2)
    return Run(model=model, data=Data(prepare=prepare), steps=8, global_batch=8, eval_every=8, log_every=4,
               optim=AdamW(warmup_steps=1), samples=Samples(prompts=()), export="none")
"""


@pytest.fixture
def written(tmp_path: Path) -> Path:
    texts = tmp_path / "texts"
    texts.mkdir()
    rng = random.Random(0)
    for number in range(40):
        (texts / f"{number}.txt").write_text(" ".join(rng.choice(("sun", "moon", "star", "sky")) for _ in range(60)))
    path = tmp_path / "small.py"
    path.write_text(RECIPE.format(text=str(texts)))
    return path


def sweep(*words: str) -> int:
    return cli.main(["sweep", *words])


def test_axes_are_told_from_flags():
    axes, fixed = split(["--a.lr", "1e-4:1e-2:log:3", "--steps", "5", "--flag", "--b=32,64", "--c", "0:1:lin:5", "x"])
    assert fixed == ("--steps", "5", "--flag", "x")
    assert [axis.flag for axis in axes] == ["--a.lr", "--b", "--c"]
    assert [float(value) for value in axes[0].values] == pytest.approx([1e-4, 1e-3, 1e-2])
    assert axes[1].values == ("32", "64")
    assert axes[2].values == ("0", "0.25", "0.5", "0.75", "1")
    points = grid(axes)
    assert len(points) == len(set(points)) == 30
    assert points[1] == (("--a.lr", "0.0001"), ("--b", "32"), ("--c", "0.25"))


def test_a_random_draw_is_a_function_of_its_seed_and_even_on_its_scale():
    axes, _ = split(["--lr", "1e-4:1e-2:log:2", "--b", "32,64"])
    points = at_random(axes, 2000, 1)
    assert points == at_random(axes, 2000, 1) != at_random(axes, 2000, 2)
    logs = [math.log10(float(dict(point)["--lr"])) for point in points]
    assert -4 <= min(logs) < -3.99 < -2.01 < max(logs) <= -2
    assert sum(logs) / len(logs) == pytest.approx(-3, abs=0.05)
    assert sum(dict(point)["--b"] == "32" for point in points) == pytest.approx(1000, abs=100)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lr", "1e-2:1e-4:log:5"], "give LOW:HIGH"),
        (["--lr", "0:1:log:5"], "give LOW:HIGH"),
        (["--lr", "a:1:log:5"], "give LOW:HIGH"),
        (["--lr", "1:2:lin:1"], "give LOW:HIGH"),
        (["--b", "32,,64"], "different values"),
        (["--b", "32,32"], "different values"),
        (["--b", "32,64", "--b", "1,2"], "swept twice"),
    ],
)
def test_bad_axes_are_named(words: list[str], said: str):
    with pytest.raises(UserError, match=said):
        split(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "5"], "nothing to sweep"),
        (["--optim.peak-lr", "1e-3,2e-3", "--method", "random"], "how many"),
        (["--optim.peak-lr", "1e-3,2e-3", "--trials", "3"], "--trials is for"),
        (["--optim.peak-lr", "1e-3,2e-3", "--hosts", "a"], "go together"),
        (["--optim.peak-lr", "1e-3,2e-3", "--hosts", "a", "--command", "ssh {host}"], "would train nothing"),
        (["--global-batch", "8,0"], "--global-batch 0"),
        (["--global-batch", "8:9:lin:3"], "8.5"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    words: list[str], said: str, written: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    out = tmp_path / "out"
    try:
        code = sweep(str(written), *words, "--out", str(out))
    except SystemExit as error:  # of a value of another type
        code = error.code
    assert code == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_the_text_is_prepared_once_before_several_hosts_read_it(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [str(written), "--seed", "1,2", "--out", str(tmp_path / "s"), "--hosts", "a,b"]
    line = f"cat {tmp_path}/s-data/index.json; exit 7 # {{command}}"
    assert sweep(*words, "--command", line) == 2
    said = capsys.readouterr()
    assert "every trial failed" in said.err
    assert '"splits"' in (tmp_path / "s" / "trial-001.log").read_text()
    axes, _ = split(["--data.prepare.vocab-size", "270,300"])
    run = recipe.load(written)
    assert command._shared_text(run, axes, tmp_path / "s") is None
    shared = command._shared_text(run, (), tmp_path / "s")
    assert shared is not None
    assert shared.out == str(tmp_path / "s-data")


def test_texts_with_commas_are_no_axes_and_the_best_is_a_recipe_whatever_they_hold(written: Path, tmp_path: Path):
    prompt = 'Hello, """ \\x'
    axes, fixed = split(["--samples.prompts", prompt, "--seed", "1,2"])
    assert [axis.flag for axis in axes] == ["--seed"]
    assert fixed == ("--samples.prompts", prompt)
    best = Trial(number=1, point=(("--seed", "2"),), score=1.0)
    going = Sweep(tmp_path / "s", plan(recipe=str(written), fixed=fixed))
    (tmp_path / "best.py").write_text(as_recipe(going, best))
    run = recipe.load(tmp_path / "best.py")
    assert (run.samples.prompts, run.seed) == ((prompt,), 2)


def test_successive_halving_spends_about_the_same_on_each_rung():
    asked = command.Arguments(method="halving", eta=3)
    assert command._rungs(asked, 900, 9) == [(100, 9), (300, 3), (900, 1)]
    assert command._rungs(asked, 900, 10) == [(100, 10), (300, 3), (900, 1)]
    assert command._rungs(asked, 2, 9)[-1] == (2, 1)
    assert command._rungs(command.Arguments(), 900, 9) == [(None, 9)]


def plan(**changes) -> Plan:
    known = {"recipe": "r.py", "fixed": (), "axes": ("--a 1,2",), "method": "halving", "count": 9, "seed": 0,
             "metric": "val_loss", "maximize": False}  # fmt: skip
    return Plan(**(known | changes))


def test_the_best_of_a_rung_go_on_and_the_record_survives(tmp_path: Path):
    points = [(("--a", str(n)),) for n in range(9)]
    seen: list[list[str]] = []

    def train(going: Sweep):
        def run(trials):
            seen.append([str(trial) for trial in trials if not trial.done])
            for trial in trials:
                number = int(dict(trial.point)["--a"])
                trial.failed, trial.score = ("it burst", None) if number == 0 else ("", 10 - number + 100 / trial.steps)
            going.save()

        return run

    going = Sweep(tmp_path / "s", plan())
    command.climb(going, points, [(100, 9), (300, 3), (900, 1)], train(going))
    assert [len(names) for names in seen] == [9, 3, 1]
    assert seen[1] == ["--a 8 --steps 300", "--a 7 --steps 300", "--a 6 --steps 300"]
    best = going.best()
    assert best is not None
    assert (dict(best.point)["--a"], best.steps) == ("8", 900)
    again = Sweep(tmp_path / "s", plan())
    assert again.trials == going.trials
    command.climb(again, points, [(100, 9), (300, 3), (900, 1)], train(again))
    assert seen[3:] == [[], [], []]
    for name in ("seed", "eta"):
        with pytest.raises(UserError, match=f"holds another sweep: {name} was 0, now 1"):
            Sweep(tmp_path / "s", plan(**{name: 1}))
    (tmp_path / "s" / "sweep.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        Sweep(tmp_path / "s", plan())


def test_a_template_reaches_its_hosts_and_a_failure_is_kept(tmp_path: Path):
    going = Sweep(tmp_path / "s", plan(method="grid", count=4))
    for number in range(1, 5):
        going.add(Trial(number=number, point=(("--a", str(number)),)))
    notes: list[str] = []
    template = 'echo "{host} {command}"; [[ "{command}" == *"--a 3"* ]] && exit 9; exit 7'
    runner.run_all(going, going.trials, template, ["one", "two"], notes.append)
    assert [trial.failed[:11] for trial in going.trials] == ["exit code 7", "exit code 7", "exit code 9", "exit code 7"]
    logs = [(tmp_path / "s" / f"trial-00{number}.log").read_text() for number in range(1, 5)]
    assert {log.split()[0] for log in logs} == {"one", "two"}
    assert "-m meshgpt.train r.py --a 2 --run-dir" in logs[1]
    refused = Trial(number=5, point=(("--a", "5"),))
    going.add(refused)
    with pytest.raises(UserError, match=r"trial-005 \(--a 5\) is refused: because"):
        runner.run_all(going, [refused], "echo because; exit 2 # {command}", ["one"], notes.append)
    assert not refused.done


class Ran:
    """`_train` without training: the exit code of each trial, and what its folder then holds."""

    def __init__(self, code: int, rows: list[dict], record: dict) -> None:
        self.code, self.rows, self.record = code, rows, record

    def __call__(self, sweep: Sweep, trial: Trial, *others: object) -> tuple[int, str]:
        run_dir = sweep.run_dir(trial)
        run_dir.mkdir(parents=True)
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        (run_dir / "run.json").write_text(json.dumps({"run": {}} | self.record))
        return self.code, "words"


@pytest.mark.parametrize(
    ("code", "last", "record", "failed"),
    [
        (2, {"loss": 3.0}, {"diverged_step": 1234}, "diverged by step 1,234"),
        (0, {"val_loss": None}, {"finished_step": 2}, "val_loss is nan"),
        (0, {"val_loss": 2.5}, {"finished_step": 2}, ""),
        (3, {"loss": 3.0}, {}, "exit code 3: words"),
    ],
)
def test_what_becomes_of_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, last: dict, record: dict, failed: str
):
    going = Sweep(tmp_path / "s", plan(method="grid", count=2))
    going.trials = [Trial(number=1, point=(("--a", "1"),)), Trial(number=2, point=(("--a", "2"),))]
    monkeypatch.setattr(runner, "_train", Ran(code, [{"step": 1, "val_loss": 3.5}, {"step": 2} | last], record))
    runner.run_all(going, going.trials, "", [], lambda text: None)
    assert [(trial.failed, trial.score) for trial in going.trials] == [(failed, None if failed else 2.5)] * 2


def test_a_metric_that_is_not_there_stops_at_the_first_trial_and_may_be_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    going = Sweep(tmp_path / "s", plan(method="grid", count=2, metric="val_los"))
    going.trials = [Trial(number=1, point=(("--a", "1"),)), Trial(number=2, point=(("--a", "2"),))]
    going.save()
    monkeypatch.setattr(runner, "_train", Ran(0, [{"step": 1, "val_loss": 3.5, "loss": 1.0}], {"finished_step": 1}))
    with pytest.raises(UserError, match="trial-001 has no val_los: give as --metric one of loss, val_loss"):
        runner.run_all(going, going.trials, "", [], lambda text: None)
    assert not (tmp_path / "s" / "trial-002").exists()
    assert Sweep(tmp_path / "s", plan(method="grid", count=2)).trials == going.trials


def test_what_breaks_in_a_thread_is_not_taken_for_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    going = Sweep(tmp_path / "s", plan(method="grid", count=1))
    going.add(Trial(number=1, point=(("--a", "1"),)))

    def full(*given: object) -> tuple[int, str]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runner, "_train", full)
    with pytest.raises(OSError, match="No space left"):
        runner.run_all(going, going.trials, "", [], lambda text: None)


def test_the_trial_of_a_lost_host_is_trained_on_another(tmp_path: Path):
    going = Sweep(tmp_path / "s", plan(method="grid", count=3))
    for number in range(1, 4):
        going.add(Trial(number=number, point=(("--a", str(number)),)))
    template = "[[ {host} == lost ]] && exit 255; sleep 0.2; exit 7 # {command}"
    runner.run_all(going, going.trials, template, ["lost", "kept"], lambda text: None)
    assert all(trial.failed.startswith("exit code 7") for trial in going.trials)
    going.add(Trial(number=4, point=(("--a", "4"),)))
    with pytest.raises(UserError, match="1 trials are left and no host"):
        runner.run_all(going, going.trials, template, ["lost"], lambda text: None)


@pytest.mark.parametrize("template", ["{command}", "bash -c '{command}'", 'bash -c "{command}"', "e='a' {command}"])
def test_a_command_is_read_as_it_is_wherever_the_template_has_it(template: str):
    words = ["a b", "it's", '"$HOME" `x` \\', "", "*"]
    command_line = [sys.executable, "-c", "import sys; print(sys.argv[1:])", *words]
    line = runner.filled(template, "h", command_line)
    said = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout
    assert said == f"{words}\n"


@pytest.mark.slow
def test_a_sweep_trains_stops_goes_on_and_writes_its_best_as_a_recipe(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    out = tmp_path / "sweep"
    words = [str(written), "--optim.peak-lr", "1e-6,1e-2", "--seed", "3", "--out", str(out)]
    assert sweep(*words, "--dry-run") == 0
    assert capsys.readouterr().out == "--optim.peak-lr 1e-6\n--optim.peak-lr 1e-2\n"
    assert sweep(*words) == 0
    said = capsys.readouterr().out
    assert "1 of 2," in said
    assert "best: --optim.peak-lr 1e-2" in said
    for name in ("best.py", "sweep.png", "sweep.json", "comparison/report.html", "trial-001/metrics.jsonl"):
        assert (out / name).stat().st_size > 100
    best = recipe.load(out / "best.py")
    assert (best.optim.peak_lr, best.seed, best.steps, best.run_dir) == (1e-2, 3, 8, "runs/best")
    kept = json.loads((out / "sweep.json").read_text())
    assert kept["trials"][1]["score"] < kept["trials"][0]["score"]
    # As a kill before the second score leaves it.
    kept["trials"][1]["score"] = None
    (out / "sweep.json").write_text(json.dumps(kept))
    before = os.stat(out / "trial-001" / "metrics.jsonl").st_mtime_ns
    assert sweep(*words) == 0
    assert "1 of 2 trials are done already" in capsys.readouterr().out
    assert os.stat(out / "trial-001" / "metrics.jsonl").st_mtime_ns == before
    assert sweep(*words, "--metric", "loss") == 2
    assert "holds another sweep" in capsys.readouterr().err
