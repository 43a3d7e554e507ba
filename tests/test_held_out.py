"""What is held out of few documents, and text that is in the held-out sources too."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshgpt.data.documents import split_hash, tail_start
from meshgpt.data.prepare import Prepare, prepare
from meshgpt.data.store import Store
from meshgpt.data.tokenizer import train_bpe
from meshgpt.errors import UserError

ROOT = Path(__file__).parents[1]
LINES = [f"{i} line of words and more words\n" for i in range(400)]
TEXT = "".join(LINES)
assert split_hash(TEXT.encode()) > 0.01


def quiet(*_: object) -> None:
    """Shows no progress."""


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([TEXT], 300).save(folder)
    return folder


@pytest.fixture
def config(tokenizer_dir: Path, tmp_path: Path) -> Prepare:
    (tmp_path / "one.txt").write_text(TEXT)
    return Prepare(
        sources=(str(tmp_path / "one.txt"),), out=str(tmp_path / "store"), tokenizer=str(tokenizer_dir), workers=1
    )


def texts_of(store: Store, name: str) -> list[str]:
    split, tokenizer = store.split(name), store.tokenizer()
    return [tokenizer.decode(split.document_tokens(i)[:-1]) for i in range(split.num_documents)]


def folder_bytes(folder: str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def json_lines(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_one_text_file_is_prepared_by_the_command_as_it_stands(config: Prepare, tmp_path: Path):
    command = [sys.executable, "-m", "meshgpt", "prepare", "one.txt", "--train-tokenizer", "bpe", "--vocab-size", "300"]
    command += ["--out", config.out, "--workers", "1"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "held out: the last 0.01 of each document, whole lines of it" in done.stdout
    store = Store.open(config.out)
    assert texts_of(store, "train") == ["".join(LINES[:396])]
    assert texts_of(store, "val") == ["".join(LINES[396:])]
    assert store.split("val").document_name(0) == "one.txt"


@pytest.mark.parametrize("size", [1, 40])
@pytest.mark.parametrize("kind", ["text", "json lines", "json"])
def test_the_tails_are_whole_lines(config: Prepare, tmp_path: Path, kind: str, size: int):
    """In a block, in fragments, and where it is known only when all is read that nothing was held out."""
    path = tmp_path / {"text": "a.txt", "json lines": "a.jsonl", "json": "a.json"}[kind]
    text = TEXT * size
    path.write_text({"text": text, "json lines": json_lines([text]), "json": json.dumps([{"text": text}])}[kind])
    store = prepare(replace(config, sources=(str(path),), val_fraction=1e-4), quiet)
    (head,), (tail,) = texts_of(store, "train"), texts_of(store, "val")
    assert head + tail == text
    assert head.endswith("\n")
    assert tail.count("\n") == max(1, -(-len(text) // 10_000 // 32))
    assert sum(store.split(name).num_bytes for name in ("train", "val")) == len(text)
    assert store.index["held_out"].startswith("the last 0.0001 of each document")


def test_a_tokenizer_is_not_trained_on_tails(config: Prepare, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json_lines(["alphabet\n" * 500 + "zebra " * 20]))
    asked = replace(config, sources=(str(tmp_path / "a.jsonl"),), tokenizer=None, train_tokenizer="bpe", vocab_size=290)
    tokenizer = prepare(asked, quiet).tokenizer()
    assert len(tokenizer.encode("alphabet")) == 1
    assert len(tokenizer.encode(" zebra")) == 6


def test_of_more_documents_one_is_held_out_whole(config: Prepare, tmp_path: Path):
    texts = [f"short {i}" for i in range(30)]
    (tmp_path / "a.jsonl").write_text(json_lines(texts))
    store = prepare(replace(config, sources=(str(tmp_path / "a.jsonl"),), val_fraction=1e-6), quiet)
    lowest = min(texts, key=lambda text: split_hash(text.encode()))
    assert texts_of(store, "val") == [lowest]
    assert texts_of(store, "train") == [text for text in texts if text != lowest]
    assert store.index["held_out"] == "the one document whose hash is lowest"


def test_two_words_that_cannot_be_cut(config: Prepare, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json_lines(["one", "two"]))
    store = prepare(replace(config, sources=(str(tmp_path / "a.jsonl"),), val_fraction=1e-6), quiet)
    assert sorted(texts_of(store, "val") + texts_of(store, "train")) == ["one", "two"]


def test_interrupted_anywhere_it_is_the_same_store(config: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("meshgpt.data.prepare._COMMIT_SECONDS", 0.0)
    (tmp_path / "a.jsonl").write_text(json_lines([TEXT * 90, TEXT]))
    asked = replace(config, sources=(str(tmp_path / "a.jsonl"),), val_fraction=1e-4)
    whole = prepare(replace(asked, out=config.out + "2"), quiet)
    for at in (1, 2, 3, 4, 5):
        seen: list[int] = []

        def interrupt(*_: object, at: int = at, seen: list[int] = seen) -> None:
            seen.append(1)
            if len(seen) == at:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            prepare(asked, interrupt)
        assert len(seen) == at or (Path(asked.out) / "index.json").exists()
    assert prepare(asked, quiet).digest == whole.digest
    assert folder_bytes(asked.out) == folder_bytes(config.out + "2")


def test_a_changed_request_replaces_what_is_unfinished_and_a_finished_one_by_the_remedy(config: Prepare):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(replace(config, val_fraction=0.3), interrupt)
    store = prepare(config, quiet)
    assert "held_out" in store.index
    other = replace(config, val_fraction=0.0)
    with pytest.raises(UserError, match=r"val_fraction was 0.01, now 0.0.*pass --overwrite to replace it"):
        prepare(other, quiet)
    assert texts_of(prepare(replace(other, overwrite=True), quiet), "train") == [TEXT]


@given(text=st.text("ab \n", max_size=60), share=st.floats(1e-6, 0.9))
def test_where_a_tail_starts(text: str, share: float):
    start = tail_start(text, share)
    if start:
        assert text[:start].strip()
        assert text[start:].strip()
        assert text[start - 1] in " \n"
        if text[start - 1] == " ":  # there is no line to hold out
            assert not any(text[:i].strip() and text[i:].strip() for i in range(len(text)) if text[i] == "\n")
    else:
        assert len(text.split()) < 2


@pytest.fixture
def in_both(config: Prepare, tmp_path: Path) -> tuple[Prepare, list[str]]:
    texts = [f"document {i}\n" for i in range(6)]
    long = TEXT * 90
    (tmp_path / "train.jsonl").write_text(json_lines([*texts[:3], long, *texts[3:], texts[0]]))
    (tmp_path / "val.jsonl").write_text(json_lines([texts[0], "new", texts[4]]))
    (tmp_path / "long.txt").write_text(long)
    return (
        replace(
            config,
            sources=(str(tmp_path / "train.jsonl"),),
            val_sources=(str(tmp_path / "val.jsonl"), str(tmp_path / "long.txt")),
            val_fraction=0.0,
        ),
        texts,
    )


@pytest.mark.parametrize("deduplicate", [False, True])
def test_text_of_held_out_sources_is_not_trained_on(in_both: tuple[Prepare, list[str]], deduplicate: bool):
    asked, texts = in_both
    store = prepare(replace(asked, deduplicate=deduplicate), quiet)
    assert texts_of(store, "train") == [texts[1], texts[2], texts[3], texts[5]]
    assert texts_of(store, "val") == [texts[0], "new", texts[4], TEXT * 90]
    counts = store.index["counts"]
    assert (counts["in_both"], counts["duplicates"]) == (4, 0)
    assert counts["in_both_bytes"] == sum(map(len, (texts[0], texts[0], texts[4], TEXT * 90)))
    store.verify()


def test_all_of_the_text_is_held_out(config: Prepare, tmp_path: Path):
    (tmp_path / "same.txt").write_text(TEXT)
    with pytest.raises(UserError, match=r"all 1 documents of .*one.txt are in .*same.txt too: name other text"):
        prepare(replace(config, val_sources=(str(tmp_path / "same.txt"),)), quiet)


def test_nothing_rare_is_in_the_index_of_a_usual_store(config: Prepare, tmp_path: Path):
    (tmp_path / "two.txt").write_text("other\n")
    store = prepare(replace(config, val_sources=(str(tmp_path / "two.txt"),)), quiet)
    assert {"held_out", "not_read"}.isdisjoint(store.index)
    assert "in_both" not in store.index["counts"]
    added_later = {"tails", "token_ids", "parse_special"}  # and there only where they were asked for
    assert set(store.index["prepare"]) == {*asdict(config.rules), "sources", "val_sources"} - added_later
