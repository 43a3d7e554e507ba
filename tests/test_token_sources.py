"""Sources of token ids: what goes in comes out, and ids that the tokenizer does not have are named."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from meshgpt.data.prepare import Prepare, prepare
from meshgpt.data.store import Store
from meshgpt.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from meshgpt.errors import UserError

TEXTS = ["because of text", "line\nbreak \u20ac", "a", "more text " * 400]


def quiet(*_: object) -> None:
    """Shows no progress."""


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["because of text " * 40], 270).save(folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_dir)


@pytest.fixture
def config(tokenizer_dir: Path, tmp_path: Path) -> Prepare:
    return Prepare(
        sources=("set in the test",),
        out=str(tmp_path / "store"),
        tokenizer=str(tokenizer_dir),
        val_fraction=0.0,
        workers=1,
        token_ids=True,
    )


def check(store: Store, tokenizer: Tokenizer, texts: list[str]) -> None:
    """The store is the one of these texts."""
    split = store.split("train")
    found = [split.document_tokens(i).tolist() for i in range(split.num_documents)]
    assert found == [[*tokenizer.encode(text), tokenizer.eot_id] for text in texts]
    assert split.documents["bytes"].tolist() == [len(text.encode()) for text in texts]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_records_of_token_ids(config: Prepare, tokenizer: Tokenizer, tmp_path: Path, name: str):
    records = [{"input_ids": tokenizer.encode(text)} for text in TEXTS]
    records[1]["input_ids"].append(tokenizer.eot_id)
    records.append({"input_ids": [*records[0]["input_ids"], tokenizer.eot_id, *records[2]["input_ids"]]})
    wrong = [*records, {"input_ids": [5, tokenizer.vocab_size]}]

    def write(rows: list[dict]) -> None:
        if name == "a.jsonl":
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)

    write(records)
    asked = replace(config, sources=(str(tmp_path / name),), field="input_ids")
    texts = [*TEXTS, TEXTS[0], TEXTS[2]]
    check(prepare(asked, quiet), tokenizer, texts)
    write(wrong)
    other = replace(asked, out=config.out + "2")
    with pytest.raises(UserError, match=rf"{name}:6: the token id {tokenizer.vocab_size} stands for no text"):
        prepare(other, quiet)
    store = prepare(replace(other, bad_records="skip"), quiet)
    check(store, tokenizer, texts)
    assert store.index["counts"]["bad_records"] == 1
    write([{"input_ids": "text"}])
    with pytest.raises(UserError, match=rf"{name}:1: .* 'input_ids' is no list of token ids: .*leave out --token-ids"):
        prepare(replace(asked, out=config.out + "3"), quiet)


def megatron(documents: list[list[list[int]]], dtype: str, code: int) -> tuple[bytes, bytes]:
    """The .bin and .idx that Megatron-LM's IndexedDatasetBuilder writes for documents of sequences."""
    sequences = [sequence for document in documents for sequence in document]
    arrays = [np.array(sequence, dtype) for sequence in sequences]
    starts = np.cumsum([0, *map(len, documents)])
    pointers = np.cumsum([0, *[one.nbytes for one in arrays]])[:-1]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(starts))
    index += np.array([len(one) for one in arrays], "<i4").tobytes() + pointers.astype("<i8").tobytes()
    return b"".join(one.tobytes() for one in arrays), index + starts.astype("<i8").tobytes()


@pytest.mark.parametrize(("dtype", "code"), [("<u2", 8), ("<i4", 4)])
def test_megatron(config: Prepare, tokenizer: Tokenizer, tmp_path: Path, dtype: str, code: int):
    ids = [tokenizer.encode(text) for text in TEXTS]
    documents = [[ids[0][:3], [*ids[0][3:], tokenizer.eot_id]], [ids[1]], [ids[2]], [[*ids[3], tokenizer.eot_id]]]
    tokens, index = megatron(documents, dtype, code)
    (tmp_path / "a.bin").write_bytes(tokens)
    (tmp_path / "a.idx").write_bytes(index)
    asked = replace(config, sources=(str(tmp_path / "a.bin"),))
    store = prepare(asked, quiet)
    check(store, tokenizer, TEXTS)
    assert store.split("train").document_name(2) == f"{tmp_path / 'a.bin'}:3"
    for i, (wrong, message) in enumerate(
        {
            index[:50]: "is cut short",
            b"words": "is none of Megatron's",
            index[:9] + b"\2" + index[10:]: "version 2",
        }.items()
    ):
        (tmp_path / "a.idx").write_bytes(wrong)
        with pytest.raises(UserError, match=message):
            prepare(replace(asked, out=f"{config.out}{i}"), quiet)


def test_nanogpt(config: Prepare, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("meshgpt.data.token_files._READ_TOKENS", 7)
    ids = [token for text in TEXTS for token in [*tokenizer.encode(text), tokenizer.eot_id]]
    np.array(ids, np.uint16).tofile(tmp_path / "train.bin")
    np.array(tokenizer.encode("held out"), np.uint16).tofile(tmp_path / "val.bin")
    asked = replace(config, sources=(str(tmp_path / "train.bin"),), val_sources=(str(tmp_path / "val.bin"),))
    store = prepare(asked, quiet)
    check(store, tokenizer, TEXTS)
    assert store.split("val").num_documents == 1
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match=r"odd.bin has 3 bytes, which are no ids of 2 bytes each"):
        prepare(replace(asked, sources=(str(tmp_path / "odd.bin"),), out=config.out + "2"), quiet)
    with pytest.raises(UserError, match=r"(train|val).bin is no text but binary.*--token-ids"):
        prepare(replace(asked, token_ids=False, out=config.out + "3"), quiet)
    with pytest.raises(UserError, match="--token-ids does not go with --train-tokenizer"):
        replace(asked, tokenizer=None, train_tokenizer="bpe", vocab_size=300)
