"""Command lines: flags and positional words in any order, and names that flags had before."""

import re
from pathlib import Path
from typing import Any

import pytest
from runs import Here

from meshgpt import flags, recipe
from meshgpt.cli import chaos, compile, data, eval, launch, models, quantize, report, sweep  # noqa: A004
from meshgpt.config import Run
from meshgpt.data.prepare import Prepare
from meshgpt.errors import UserError
from meshgpt.inference.sampling import Sampling
from meshgpt.planning import fit, memory

ROOT = Path(__file__).parent.parent
QUICKSTART = str(ROOT / "configs" / "quickstart.py")
SOURCES: dict[str, Any] = {"positional": "--sources"}


def read(cls: type, *words: str, **options: Any) -> Any:
    return flags.parse(cls, words, "test", **options)


@pytest.mark.parametrize(
    ("cls", "places", "given", "options"),
    [
        (Prepare, ("a.txt", "b"), ("--out", "o", "--tokenizer", "t", "--deduplicate"), SOURCES),
        (Prepare, ("a.txt",), ("--out", "o", "--tokenizer", "t", "--val-sources", "v", "w"), SOURCES),
        (models.GenerateArguments, ("runs/a",), ("--temperature", "0", "--prompt", "def ", "class "), {}),
        (models.GenerateArguments, ("runs/a",), ("--mesh.data", "-1", "--top-p=0.5"), {}),
        (models.ExportArguments, ("runs/a",), ("--out", "o", "--merge"), {}),
        (models.ImportArguments, ("gpt2",), ("--out", "o"), {}),
        (quantize.Arguments, ("runs/a",), ("--format", "nf4", "--out", "o", "--eval-text", "x.txt", "y.txt"), {}),
        (report.Arguments, ("runs/a", "runs/b"), ("--out", "o", "--no-serve"), {}),
        (report.Arguments, ("runs/a",), ("--language", "en", "de"), {}),
        (eval.Arguments, ("runs/a",), ("--limit", "3", "--perplexity", "x.txt", "y.txt"), {}),
        (fit.Arguments, ("runs/a", "runs/b"), ("--resamples", "30"), {}),
        (data.OrderArguments, ("runs/a",), ("--from-step", "2"), {}),
        (data.ShowArguments, ("runs/a",), ("--step", "2"), {}),
        (data.FindArguments, ("store", "a text"), ("--limit", "2"), {}),
        (data.InspectArguments, ("store",), ("--samples", "2"), {}),
        (data.PackArguments, ("store",), ("--seq-len", "8"), {}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_positional_words_stand_before_or_behind_the_flags(cls: type, places: Any, given: Any, options: dict[str, Any]):
    first = read(cls, *places, *given, **options)
    assert read(cls, *given, *places, **options) == first
    assert read(cls, *given, "--", *places, **options) == first
    assert read(cls, places[0], *given, *places[1:], **options) == first


def test_a_flag_of_many_words_keeps_at_least_one_and_what_is_missing_is_named():
    assert read(models.GenerateArguments, "runs/a", "--prompt", "x").prompt == ("x",)
    assert read(models.GenerateArguments, "--prompt", "x", "y", "runs/a").prompt == ("x", "y")
    with pytest.raises(UserError, match=r"SOURCE is missing: A run's folder"):
        read(models.GenerateArguments, "--prompt", "x")
    with pytest.raises(UserError, match="TEXT is missing"):
        read(data.FindArguments, "store", "--limit", "3")


@pytest.mark.parametrize("words", [("runs/a", "--out", "o", "--merg"), ("--out", "o", "--merg", "runs/a")])
def test_a_mistake_is_still_told_with_a_suggestion(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]):
    with pytest.raises(SystemExit) as end:
        read(models.ExportArguments, *words)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "Perhaps you meant" in said
    assert "--merge" in said


EVAL = ("a", "--choices", "c")


@pytest.mark.parametrize(
    ("cls", "before", "old", "new"),
    [
        (Sampling, (), ("--max-tokens", "7"), ("--max-new-tokens", "7")),
        (launch.Arguments, (), ("--deadline-seconds=12.5",), ("--deadline", "12.5")),
        (eval.Arguments, EVAL, ("--max-gen-toks", "9"), ("--max-new-tokens", "9")),
        (eval.Arguments, EVAL, ("--precision.compute", "float32"), ("--compute", "float32")),
        (models.GenerateArguments, ("a",), ("--max-tokens", "9"), ("--max-new-tokens", "9")),
        (models.ExportArguments, ("a", "--out", "o"), ("--replace",), ("--overwrite",)),
        (models.ExportArguments, ("a", "--out", "o", "--overwrite"), ("--no-replace",), ("--no-overwrite",)),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_other_names_of_a_flag_are_accepted(cls: type, before: Any, old: Any, new: Any):
    assert read(cls, *before, *old) == read(cls, *before, *new) != read(cls, *before)


def test_other_names_reach_into_a_recipe():
    words = ("--samples.max-tokens", "5", "--evals.max-new-tokens", "6")
    run = recipe.parse([QUICKSTART, *words], "test")
    assert (run.samples.max_new_tokens, run.evals.max_gen_toks) == (5, 6)
    assert flags.respelled(Run, ["--samples.max-tokens=5", "max-tokens"]) == [
        "--samples.max-new-tokens=5",
        "max-tokens",
    ]


def test_the_flags_of_a_verb_are_told_from_those_of_the_recipe():
    own, rest = flags.split(
        launch.Arguments, ["--processes", "2", "r.py", "--steps", "4", "--elastic", "--port=7", "--seed=1"]
    )
    assert own == ["--processes", "2", "--elastic", "--port=7"]
    assert rest == ["r.py", "--steps", "4", "--seed=1"]


@pytest.mark.parametrize(
    ("cls", "own"),
    [
        (launch.Arguments, ("--processes", "2")),
        (chaos.Arguments, ("--kills", "3")),
        (sweep.Arguments, ("--metric", "loss")),
        (compile.Arguments, ("--topology", "v3-8", "--fix")),
        (memory.Arguments, ("--tries", "2", "--json")),
    ],
    ids=lambda value: value.__module__ if isinstance(value, type) else "",
)
def test_a_recipe_stands_before_or_behind_the_flags(cls: type, own: tuple[str, ...]):
    wanted = (read(cls, *own), ["r.py", "--steps", "4"])
    for words in (
        ["r.py", *own, "--steps", "4"], [*own, "r.py", "--steps", "4"], ["--steps", "4", *own, "r.py"],
        [*own, "--steps", "4", "r.py"],
    ):  # fmt: skip
        assert recipe.take(cls, words, "test") == wanted


def test_a_recipe_behind_the_flags_is_the_only_word_that_ends_as_recipes_do():
    assert recipe.recipe_first(["--steps", "3", "a/r.py:small", "--smoke"]) == [
        "a/r.py:small",
        "--steps",
        "3",
        "--smoke",
    ]
    assert recipe.recipe_first(["r", "--data.prepare.sources", "x.py"]) == ["r", "--data.prepare.sources", "x.py"]
    assert recipe.recipe_first(["--steps", "3"]) == ["--steps", "3"]
    assert recipe.recipe_first([]) == []
    with pytest.raises(UserError, match=r"x\.py or r\.py"):
        recipe.recipe_first(["--data.prepare.sources", "x.py", "r.py"])
    before = recipe.parse([QUICKSTART, "--steps", "300", "--smoke"], "test")
    assert recipe.parse(["--steps", "300", "--smoke", QUICKSTART], "test") == before


def test_prepare_takes_its_sources_anywhere(here: Here, tmp_path: Path):
    (tmp_path / "a.txt").write_text("a text of some words " * 60)
    (tmp_path / "b.txt").write_text("another text of some words " * 60)
    made = {}
    for name, words in {
        "before": ("a.txt", "b.txt", "--out", "{}"), "behind": ("--out", "{}", "a.txt", "b.txt"),
        "around": ("a.txt", "--out", "{}", "b.txt"),
    }.items():  # fmt: skip
        out = tmp_path / name
        paths = [str(tmp_path / word) if word.endswith(".txt") else word.format(out) for word in words]
        ended = here.cli("prepare", "--train-tokenizer", "bpe", "--vocab-size", "300", "--val-fraction", "0", *paths)
        assert ended.code == 0, ended
        made[name] = re.findall("train: .*", ended.out)
    assert made["before"] == made["behind"] == made["around"]
    assert "2 documents" in made["before"][0]
