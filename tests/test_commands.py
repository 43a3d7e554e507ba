"""The verbs besides `train`, as their user calls them."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import runs
from runs import Here

from meshgpt.data.store import Store
from meshgpt.data.tokenizer import load_tokenizer


def test_prepare_makes_a_store_that_train_takes(here: Here, tmp_path: Path):
    texts, out = here.workshop.texts, tmp_path / "store"
    arguments = ("--out", out, "--train-tokenizer", "bpe", "--vocab-size", 320, "--val-fraction", 0.2, "--workers", 1)
    ended = here.cli("prepare", texts, *arguments)
    assert ended.code == 0, ended
    assert f"{out} is ready: train on it with --data.store {out}" in ended.out
    assert "train: " in ended.out
    assert "val: " in ended.out
    assert Store.open(out).digest == Store.open(here.workshop.store).digest
    few = ("--run-dir", tmp_path / "run", "--export", "none", "--samples.prompts")
    assert here.train(here.workshop.recipe(tmp_path, store=out), *few).code == 0


def test_prepare_takes_several_sources_and_loads_a_tokenizer(here: Here, tmp_path: Path):
    one, two = tmp_path / "one.txt.gz", tmp_path / "two.jsonl"
    one.write_bytes(gzip.compress(b"some words"))
    two.write_text(json.dumps({"body": "other words"}) + "\n")
    tokenizer = here.workshop.store / "tokenizer"
    ended = here.cli(
        "prepare", one, two, "--out", tmp_path / "out", "--tokenizer", tokenizer, "--field", "body", "--val-fraction", 0
    )
    assert ended.code == 0, ended
    assert Store.open(tmp_path / "out").split("train").num_documents == 2


def test_prepares_mistakes_end_in_one_message(here: Here, tmp_path: Path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 words")
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("mine")
    text = here.workshop.texts / "heapq.txt"
    tokenizer = ("--tokenizer", here.workshop.store / "tokenizer", "--val-fraction", 0)
    out = tmp_path / "out"
    here.cli("prepare", tmp_path / "none.txt", "--out", out, *tokenizer).refused("none.txt", "does not exist")
    here.cli("prepare", tmp_path / "empty.txt", "--out", out, *tokenizer).refused("empty.txt", "no text")
    shutil.rmtree(out)
    invalid = ("--on-invalid-utf8", "error")
    here.cli("prepare", tmp_path / "latin.txt", "--out", out, *tokenizer, *invalid).refused("latin.txt", "UTF-8")
    shutil.rmtree(out)
    here.cli("prepare", tmp_path / "broken.jsonl", "--out", out, *tokenizer).refused("broken.jsonl", "2")
    here.cli("prepare", text, "--out", tmp_path / "taken", *tokenizer).refused(str(tmp_path / "taken"), "--out")
    here.cli("prepare", text, "--out", out, "--tokenizer", tmp_path / "no").refused(str(tmp_path / "no"))
    here.cli("prepare", text, "--out", out).refused("name one tokenizer", "--train-tokenizer")
    here.cli("prepare", text, *tokenizer).refused("--out")
    here.cli("prepare", text, "--out", out, *tokenizer, "--wokers", 3).refused("--wokers", "--workers")
    here.cli("prepare", text, "--out", out, *tokenizer, "--workers", "many").refused("--workers", "many")
    here.cli("prepare").refused("--sources")


def test_prepare_replaces_a_store_only_when_told(here: Here, tmp_path: Path):
    tokenizer = ("--tokenizer", here.workshop.store / "tokenizer", "--val-fraction", 0, "--out", tmp_path / "out")
    heapq, ast = (here.workshop.texts / f"{name}.txt" for name in ("heapq", "ast"))
    assert here.cli("prepare", heapq, *tokenizer).code == 0
    first = Store.open(tmp_path / "out").digest
    here.cli("prepare", ast, *tokenizer).refused("--overwrite")
    assert Store.open(tmp_path / "out").digest == first
    assert here.cli("prepare", ast, *tokenizer, "--overwrite").code == 0
    assert Store.open(tmp_path / "out").digest != first


def test_generate_gives_the_same_from_run_and_export(here: Here, finished: Path):
    flags = ("--prompt", "def f", "class ", "--temperature", 0, "--max-new-tokens", 8)
    run, export = here.cli("generate", finished, *flags), here.cli("generate", finished / "export", *flags)
    assert run.code == export.code == 0, (run, export)
    assert run.out == export.out
    assert run.out.startswith("def f")
    assert "\nclass " in run.out


def test_generates_samples_are_those_of_the_seed(here: Here, finished: Path):
    flags = ("--prompt", "def f", "--samples", 2, "--max-new-tokens", 8, "--top-k", 9, "--top-p", 0.9)
    first, again, other = (here.cli("generate", finished, *flags, "--seed", seed) for seed in (1, 1, 2))
    assert first.code == 0, first
    assert first.out.count("def f") == 2
    assert first.out == again.out != other.out


def test_generates_mistakes_end_in_one_message(here: Here, finished: Path, tmp_path: Path):
    here.cli("generate", finished, "--prompt", "words " * 40).refused("tokens", "context is 32")
    here.cli("generate", tmp_path / "none").refused(str(tmp_path / "none"), "does not exist")
    here.cli("generate", tmp_path).refused("none of run.json, imported.json and config.json")
    here.cli("generate", finished, "--temperature", -1).refused("temperature", "-1")
    here.cli("generate", finished, "--step", 3).refused("--step 3", "[15, 20]")
    here.cli("generate", finished, "--promt", "a").refused("--promt", "--prompt")
    here.cli("generate").refused("SOURCE is missing")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_writes_what_the_run_exported(here: Here, finished: Path, tmp_path: Path, dtype: str):
    out = tmp_path / "out"
    ended = here.cli("export", finished, "--out", out, "--dtype", dtype)
    assert ended.code == 0, ended
    assert "read back from disk: " in ended.out
    assert f"{out} is ready" in ended.out
    assert load_tokenizer(out).fingerprint == load_tokenizer(finished / "tokenizer").fingerprint
    if dtype == "float32":
        for file in (finished / "export").iterdir():
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    else:
        assert (out / "model.safetensors").stat().st_size < (finished / "export/model.safetensors").stat().st_size * 0.6


def test_export_replaces_only_when_told_and_only_its_own(here: Here, finished: Path, tmp_path: Path):
    out = runs.copied(finished / "export", tmp_path / "out")
    (out / "model.safetensors").write_bytes(b"an earlier one")
    here.cli("export", finished, "--out", out).refused(str(out), "holds a model already")
    assert (out / "model.safetensors").read_bytes() == b"an earlier one"
    assert here.cli("export", finished, "--out", out, "--replace").code == 0
    assert (out / "model.safetensors").read_bytes() == (finished / "export/model.safetensors").read_bytes()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("mine")
    here.cli("export", finished, "--out", tmp_path / "thesis", "--replace").refused("is not an exported model")
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "mine"
    here.cli("export", finished).refused("--out")
