"""Whether two tokenizers are the same is asked of their whole vocabularies and rules, and answered as their ids do."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from meshgpt.data.tokenizer import Tokenizer, load_tokenizer, train_bpe, train_sentencepiece
from meshgpt.data.tokenizer_difference import difference

TEXTS = [Path(json.__file__).read_text(), Path(random.__file__).read_text()]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    train_bpe(TEXTS, 350).save(folder)
    return folder


def changed(folder: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Tokenizer:
    described = json.loads((folder / "tokenizer.json").read_text())
    change(described)
    out.mkdir()
    (out / "tokenizer.json").write_text(json.dumps(described))
    return load_tokenizer(out)


def test_a_permutation_of_ids_that_a_few_sentences_do_not_show_is_found(bpe: Path, tmp_path: Path):
    ours = load_tokenizer(bpe)
    sample = set(ours.encode("The cafe's menu: 3 eggs, toast"))

    def permute(described: dict[str, Any]) -> None:
        vocab = described["model"]["vocab"]
        rare = [piece for piece, i in vocab.items() if i not in sample and i > 260][:72]
        ids = [vocab[piece] for piece in rare]
        vocab.update(zip(rare, ids[1:] + ids[:1], strict=True))

    theirs = changed(bpe, tmp_path / "new", permute)
    assert "72 of 350 ids stand for other pieces" in difference(theirs, ours)
    assert any(theirs.encode(text) != ours.encode(text) for text in TEXTS)


def test_merges_rules_and_matched_tokens_count_and_the_rest_does_not(bpe: Path, tmp_path: Path):
    ours = load_tokenizer(bpe)

    def swap(described: dict[str, Any]) -> None:
        described["model"]["merges"].reverse()

    def prefix(described: dict[str, Any]) -> None:
        described["pre_tokenizer"]["add_prefix_space"] = True

    def lower(described: dict[str, Any]) -> None:
        described["normalizer"] = {"type": "Lowercase"}

    def matched(described: dict[str, Any]) -> None:
        flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": False}
        described["added_tokens"].append({"id": 350, "content": "def ", **flags})

    changes = {
        "merges differ from number 1 on": swap,
        "pre-tokenizer is": prefix,
        "normalizer is": lower,
        "def ": matched,
    }
    for number, (said, change) in enumerate(changes.items()):
        theirs = changed(bpe, tmp_path / str(number), change)
        assert said in difference(theirs, ours)
        assert any(theirs.encode(text) != ours.encode(text) for text in TEXTS), said

    def offsets(described: dict[str, Any]) -> None:
        described["pre_tokenizer"]["trim_offsets"] = not described["pre_tokenizer"]["trim_offsets"]

    def extra(described: dict[str, Any]) -> None:
        flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
        described["added_tokens"].append({"id": 350, "content": "<|pad|>", **flags})

    for name, change in (("offsets", offsets), ("extra", extra)):
        theirs = changed(bpe, tmp_path / name, change)
        assert difference(theirs, ours) == difference(ours, theirs) == ""
        assert all(theirs.encode(text) == ours.encode(text) for text in [*TEXTS, "<|pad|>"])


def test_vocabulary_and_merges_are_their_tokenizer_json(bpe: Path, tmp_path: Path):
    described = json.loads((bpe / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(described["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    assert difference(load_tokenizer(tmp_path), load_tokenizer(bpe)) == ""


def test_sentencepiece(tmp_path: Path):
    ours = train_sentencepiece(TEXTS, 400)
    ours.save(tmp_path / "both")
    (tmp_path / "json").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "json" / name).write_bytes((tmp_path / "both" / name).read_bytes())
    assert difference(load_tokenizer(tmp_path / "json"), ours) == "", "the same tokenizer in the other form"
    assert difference(train_sentencepiece(TEXTS[:1], 400), ours)

    def unigram(name: str, **settings: object) -> Tokenizer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter("".join(TEXTS).splitlines()), model_prefix=str(tmp_path / name), vocab_size=300,
            model_type="unigram", minloglevel=2, hard_vocab_limit=False, **settings,
        )  # fmt: skip
        return load_tokenizer(tmp_path / f"{name}.model")

    one, again = unigram("one"), unigram("again")
    assert difference(one, again) == ""
    assert "prefix of a space" in difference(one, unigram("bare", add_dummy_prefix=False))
    assert difference(one, ours)
