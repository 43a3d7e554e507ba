"""Best-fit packing: every token once, hardly any padding, few documents cut; and the plan beside its store."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshgpt.data.packing import PIECE, pack, plan, plan_files
from meshgpt.data.prepare import Prepare, prepare
from meshgpt.data.records import Packed, Sequences
from meshgpt.data.store import Store
from meshgpt.errors import UserError


def check(lengths: np.ndarray, seq_len: int) -> tuple[float, np.ndarray]:
    """Every token in one piece, no record too full, no piece over a document's border; padding, and fills."""
    ends = np.cumsum(lengths)
    pieces, offsets = plan(ends, seq_len)
    assert pieces.dtype == PIECE
    starts, stops = pieces["start"], pieces["start"] + pieces["length"]
    order = np.argsort(starts)
    assert np.array_equal(np.concatenate([[0], stops[order][:-1]]), starts[order])
    assert stops.max() == ends[-1]
    assert pieces["length"].min() > 0
    assert np.array_equal(np.searchsorted(ends, starts, side="right"), np.searchsorted(ends, stops - 1, side="right"))
    fills = np.add.reduceat(pieces["length"], offsets[:-1])
    assert fills.max() <= seq_len
    return 1 - ends[-1] / (len(fills) * seq_len), fills


@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=200), seq_len=st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_every_token_lies_in_one_record(lengths: list[int], seq_len: int):
    padding, fills = check(np.array(lengths), seq_len)
    assert padding < 0.01 or padding * len(fills) < 1  # or less than one record


@pytest.mark.parametrize("kind", ["articles", "just over half", "just over a third", "all alike"])
def test_padding_is_below_a_percent_whatever_the_lengths(kind: str):
    rng = np.random.default_rng(0)
    lengths = {
        "articles": rng.lognormal(6, 1.2, 20_000).astype(int) + 1,
        "just over half": rng.integers(513, 600, 5_000),
        "just over a third": rng.integers(342, 360, 5_000),
        "all alike": np.full(5_000, 700),
    }[kind]
    assert check(lengths, 1024)[0] < 0.01


def test_documents_that_fit_are_whole():
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5.5, 1.0, 20_000).astype(int) + 1
    pieces, _ = plan(np.cumsum(lengths), 1024)
    document = np.searchsorted(np.cumsum(lengths), pieces["start"], side="right")
    parts = np.bincount(document)
    assert np.array_equal(parts, -(-lengths // 1024))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    config = Prepare(
        sources=(str(Path(sysconfig.get_path("stdlib")) / "asyncio"),),
        extensions=(".py",),
        out=str(tmp_path_factory.mktemp("stores") / "store"),
        train_tokenizer="bpe",
        vocab_size=400,
        val_fraction=0.2,
        workers=1,
    )
    return prepare(config, lambda *_: None)


def test_a_packed_store_gives_the_documents_back(store: Store):
    done = pack(store, 128)
    assert done.padding < 0.01
    split = store.split("train")
    packed = Packed(store, split, 128)
    assert len(packed) == done.records
    seen = np.zeros(split.num_tokens, int)
    for record in range(len(packed)):
        row = np.full(129, -1, np.int32)
        counted = packed.read(record, row)
        assert row[0] == store.eot_id
        assert (row[1 + counted :] == store.eot_id).all()
        at = 1
        for start, stop in packed.pieces(record):
            assert np.array_equal(row[at : at + stop - start], split.tokens(start, stop))
            seen[start:stop] += 1
            at += stop - start
        assert at == 1 + counted
    assert (seen == 1).all()
    for number in (0, 5, split.num_documents - 1):
        start, stop = split.document_range(number)
        expected = {r for r in range(len(packed)) if any(a < stop and b > start for a, b in packed.pieces(r))}
        assert packed.covering(start, stop) == sorted(expected)
        whole = Sequences(split, 128)
        expected = {r for r in range(len(whole)) if any(a < stop and b > start for a, b in whole.pieces(r))}
        assert whole.covering(start, stop) == sorted(expected)


def test_plans_that_cannot_be_used(store: Store):
    split = store.split("train")
    with pytest.raises(UserError, match=r"is not packed for sequences of 77 tokens: run `meshgpt data pack .* 77`"):
        Packed(store, split, 77)
    pack(store, 64)
    files = plan_files(store.folder, "train", 64)
    index = files.index.read_text()
    files.pieces.write_bytes(files.pieces.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(UserError, match=r"best_fit-64\.npy is missing or damaged"):
        Packed(store, split, 64)
    files.index.write_text(json.dumps({**json.loads(index), "store": "0" * 64}))
    with pytest.raises(UserError, match="was made for another store"):
        Packed(store, split, 64)
    files.index.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        Packed(store, split, 64)
    with pytest.raises(UserError, match="seq_len 0"):
        pack(store, 0)
