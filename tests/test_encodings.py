"""Text files in other encodings, markers between documents, and what a tokenizer loses; against Python's own codecs."""

import codecs
import gzip
import io
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from meshgpt import cli
from meshgpt.data.blocks import parts_of
from meshgpt.data.encodings import as_utf8
from meshgpt.data.prepare import Prepare, prepare
from meshgpt.data.store import Store
from meshgpt.data.tokenizer import train_bpe
from meshgpt.errors import UserError

TEXT = "Größe und Übermaß, façade, naïve: déjà vu.\nDas Mädchen hört süße Lieder über schöne Städte.\n" * 3
END = "<|endoftext|>"


def silent(label: str, done: int, total: int | None) -> None:
    del label, done, total


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([TEXT], 300).save(folder)
    return folder


def stored(tmp_path: Path, tokenizer: Path, *sources: Path, **changes: object) -> Store:
    request = Prepare(sources=tuple(map(str, sources)), out=str(tmp_path / "store"), tokenizer=str(tokenizer),
                      val_fraction=0.0, workers=1, **changes)  # fmt: skip
    return prepare(request, silent)


def texts(store: Store) -> list[str]:
    split, read = store.split("train"), store.tokenizer()
    return [read.decode(split.document_tokens(i)[:-1]) for i in range(split.num_documents)]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-32-be", "cp1252", "utf-8-sig"])
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".txt.gz"])
def test_a_named_encoding_is_read(encoding: str, ending: str, tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / f"a{ending}"
    content = json.dumps({"text": TEXT}, ensure_ascii=False) + "\n" if ending == ".jsonl" else TEXT
    data = content.encode(encoding)
    path.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    assert texts(stored(tmp_path, tokenizer, path, encoding=encoding)) == [TEXT]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8", "utf-8-sig"])
def test_an_encoding_is_recognised(encoding: str, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT.encode(encoding))
    assert texts(stored(tmp_path, tokenizer, tmp_path / "a.txt", encoding="detect")) == [TEXT]


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60), encoding=st.sampled_from(["utf-16", "utf-32-le", "utf-8"]), size=st.integers(1, 9))
def test_any_piece_of_a_converted_text(text: str, encoding: str, size: int) -> None:
    stream, found = as_utf8(io.BytesIO(text.encode(encoding)), encoding), b""
    while data := stream.read(size):
        found += data
    assert found == text.encode()


def test_mistakes_about_encodings(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"))
    with pytest.raises(UserError, match=r"name its encoding with --encoding utf-16"):
        stored(tmp_path, tokenizer, tmp_path / "a.txt")
    for name in ("klingon", "zlib_codec", "rot13", ""):
        with pytest.raises(UserError, match=f"--encoding {name!r} is not known"):
            stored(tmp_path, tokenizer, tmp_path / "a.txt", encoding=name)


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.text(st.sampled_from("<|>endoftx \n"), max_size=20), min_size=1, max_size=6))
def test_markers_are_found_wherever_they_lie(parts: list[str]) -> None:
    whole = END.join(parts)
    found = [part.decode() for part in parts_of(io.BytesIO(whole.encode()), END.encode())]
    assert found == whole.split(END)


def test_a_file_is_split_at_its_markers(tokenizer: Path, tmp_path: Path) -> None:
    parts = ["one\n", "two", "", "three " * 300_000, "four"]  # the fourth is larger than a block
    (tmp_path / "a.txt").write_text(END.join(parts))
    (tmp_path / "b.txt").write_text("five")
    store = stored(tmp_path, tokenizer, tmp_path / "a.txt", tmp_path / "b.txt", split_at=END)
    assert texts(store) == ["one\n", "two", "three " * 300_000, "four", "five"]
    assert store.split("train").document_name(1).endswith("a.txt:2")


def test_special_tokens_in_a_text_are_read_when_asked(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"one{END}two")
    for parse, count in ((False, 1), (True, 2)):
        store = stored(tmp_path / str(parse), tokenizer, tmp_path / "a.txt", parse_special=parse)
        ids = store.split("train").tokens(0, store.split("train").num_tokens)
        assert (ids == store.eot_id).sum() == count
    with pytest.raises(UserError, match=r"parse_special was (True, now None|None, now True)"):
        stored(tmp_path / "True", tokenizer, tmp_path / "a.txt")


def test_what_a_tokenizer_loses_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = {word: i for i, word in enumerate(["<unk>", "</s>", "the", "cat"])}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    (tmp_path / "lossy").mkdir()
    backend.save(str(tmp_path / "lossy" / "tokenizer.json"))
    (tmp_path / "lossy" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    lines = ["the cat", "the\ncat sat"] * 40
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    flags = ("prepare", tmp_path / "a.jsonl", "--val-fraction", "0.3")
    assert cli.main([*map(str, flags), "--out", str(tmp_path / "s"), "--tokenizer", str(tmp_path / "lossy")]) == 0
    said = capsys.readouterr().out
    # "\n" becomes a space, and "sat" unknown: 1 + 3 characters of each other document.
    assert "the tokenizer loses 160 characters of 40 documents and has 40 unknown tokens for them" in said
    assert "bits per byte will not be given" in said
    store = Store.open(tmp_path / "s")
    assert not store.split("val").lossless
    assert cli.main(["data", "inspect", str(tmp_path / "s")]) == 0
    assert "lost by the tokenizer: 160 characters" in capsys.readouterr().out


def test_a_tokenizer_with_fewer_ids_than_asked_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(TEXT * 8000)  # 1.5 MB, two blocks
    flags = ["prepare", str(tmp_path / "a.txt"), "--val-fraction", "0", "--train-tokenizer", "bpe", "--vocab-size"]
    assert cli.main([*flags, "2000", "--tokenizer-bytes", "100000", "--out", str(tmp_path / "s")]) == 0
    assert "ids, not 2,000: the text that it was trained on has no more pairs" in capsys.readouterr().out
    assert 300 < Store.open(tmp_path / "s").vocab_size < 2000
