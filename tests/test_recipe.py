"""Recipe files and their flags."""

from pathlib import Path

import pytest

from meshgpt import recipe
from meshgpt.config import Run
from meshgpt.errors import UserError
from meshgpt.optim.config import Cosine, Piece, Piecewise

ROOT = Path(__file__).parent.parent
RECIPE = """import dataclasses
from meshgpt.config import Data, Run
from meshgpt.models import GPT2Config, GPTJConfig
from meshgpt.optim import AdamW, Piece, Piecewise

def config():
    return Run(model=GPT2Config(), data=Data(store="s"), steps=10, global_batch=8, {more})
"""
PIECEWISE = "optim=AdamW(schedule=Piecewise(pieces=(Piece(steps=3, to=1.0), Piece(steps=4, to=0.1, shape='cosine'))))"


def written(folder: Path, more: str = "", text: str | None = None) -> Path:
    path = folder / "mine.py"
    path.write_text(RECIPE.format(more=more) if text is None else text)
    return path


def parse(path: Path, *flags: str) -> Run:
    return recipe.parse([str(path), *flags], "meshgpt train")


def test_the_runs_folder_is_named_after_the_recipe(tmp_path: Path):
    assert recipe.load(written(tmp_path)).run_dir == "runs/mine"
    assert recipe.load(written(tmp_path, "run_dir='there'")).run_dir == "there"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_recipe_of_ours_takes_the_common_flags(path: Path):
    run = parse(
        path, "--steps", "7000", "--seed", "5", "--global-batch", "64", "--seq-len", "128", "--accumulate", "2",
        "--mesh.data", "2", "--mesh.fsdp", "-1", "--mesh.tensor", "4", "--optim.peak-lr", "0.5", "--resume", "must",
        "--run-dir", "here",
    )  # fmt: skip
    assert (run.steps, run.seed, run.global_batch, run.seq_len, run.accumulate) == (7000, 5, 64, 128, 2)
    assert (run.mesh.data, run.mesh.fsdp, run.mesh.tensor) == (2, -1, 4)
    assert (run.optim.peak_lr, run.resume, run.run_dir) == (0.5, "must", "here")


def test_flags_reach_into_unions_and_tuples(tmp_path: Path):
    run = parse(written(tmp_path, PIECEWISE), "--optim.schedule.pieces.1.steps", "9", "--model.no-tied-head")
    assert run.optim.schedule == Piecewise(pieces=(Piece(steps=3, to=1.0), Piece(steps=9, to=0.1, shape="cosine")))
    run = parse(written(tmp_path), "--optim.schedule.final", "0.3", "--samples.prompts", "a", "b c")
    assert run.optim.schedule == Cosine(final=0.3)
    assert run.samples.prompts == ("a", "b c")
    assert parse(written(tmp_path), "--samples.prompts").samples.prompts == ()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--optim.peak-lrr", "3"), ("--optim.peak-lrr", "Perhaps you meant", "--optim.peak-lr")),
        (("--steps", "many"), ("--steps", "many")),
        (("--resume", "maybe"), ("maybe", "never")),
        (("more",), ("more",)),
    ],
)
def test_wrong_flags_end_with_code_2_and_a_hint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], words: tuple[str, ...]
):
    with pytest.raises(SystemExit) as end:
        parse(written(tmp_path), *flags)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said


def test_help_explains_the_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        parse(written(tmp_path), "--help")
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Number of optimizer steps that the learning-rate schedule is made for. (default: 10)" in said
    assert "Number of sequences in a step, over all devices" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "no function config"),
        ("def config():\n    return 3", "no function config"),
        ("def config(:", "SyntaxError"),
        ("def config():\n    import no_such_thing", "line 2: ModuleNotFoundError.*no_such_thing"),
        (RECIPE.format(more="stepz=3"), "line 7: TypeError.*stepz"),
        (RECIPE.format(more="accumulate=3"), "line 7: .*--accumulate 3"),
    ],
)
def test_a_recipe_that_gives_no_run_is_refused_by_place(tmp_path: Path, text: str, words: str):
    with pytest.raises(UserError, match=rf"mine\.py.*{words}"):
        recipe.load(written(tmp_path, text=text))


def test_what_is_no_recipe_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"no recipe .*none\.py: name a Python file"):
        recipe.load(tmp_path / "none.py")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="not a Python file"):
        recipe.load(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="which recipe"):
        recipe.parse([], "meshgpt train")
    with pytest.raises(UserError, match="which recipe"):
        recipe.parse(["--steps", "3"], "meshgpt train")
