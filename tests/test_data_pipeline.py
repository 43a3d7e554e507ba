"""The order of sequences as a pure function, and every held-out token exactly once."""

import sysconfig
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meshgpt.data.batch_sizes import BatchSizes
from meshgpt.data.mixture import Schedule, Source, Stage
from meshgpt.data.pipeline import Batches, EvalBatches, _permutation
from meshgpt.data.prepare import Prepare, prepare
from meshgpt.data.records import Records, Sequences
from meshgpt.data.store import Split
from meshgpt.errors import UserError


def quiet(*_: object) -> None:
    """Shows no progress."""


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Split]:
    config = Prepare(
        sources=(str(Path(sysconfig.get_path("stdlib")) / "asyncio"),),
        extensions=(".py",),
        out=str(tmp_path_factory.mktemp("stores") / "store"),
        train_tokenizer="bpe",
        vocab_size=400,
        val_fraction=0.2,
        workers=1,
        shard_tokens=10_007,
    )
    store = prepare(config, quiet)
    return {name: store.split(name) for name in ("train", "val")}


def single(records: Records, seed: int, global_batch: int) -> Batches:
    stage = Stage(sources=(Source(store="one", max_epochs=0.0),))
    schedule = Schedule(
        (stage,), ("one",), (records.split.num_tokens,), (len(records),), BatchSizes.constant(global_batch)
    )
    return Batches(
        sources=(records,), names=("",), schedule=schedule, seed=seed, sizes=BatchSizes.constant(global_batch)
    )


def record(records: Records, number: int) -> np.ndarray:
    row = np.empty(records.seq_len + 1, np.int32)
    assert records.read(number, row) == records.seq_len
    return row


def order(batches: Batches, start: int, stop: int) -> list[int]:
    return batches.locate(np.arange(start, stop))[1].tolist()


@pytest.fixture
def batches(splits: dict[str, Split]) -> Batches:
    return single(Sequences(splits["train"], 64), 3, 6)


def test_records_tile_the_split(splits: dict[str, Split]):
    split = splits["train"]
    sequences = Sequences(split, 64)
    everything = split.tokens(0, split.num_tokens)
    assert len(sequences) == (split.num_tokens - 1) // 64
    for number in (0, 1, 155, 156, len(sequences) - 1):
        assert np.array_equal(record(sequences, number), everything[number * 64 : number * 64 + 65])
    targets = np.concatenate([record(sequences, number)[1:] for number in range(len(sequences))])
    assert np.array_equal(targets, everything[1 : 1 + len(targets)])


def test_each_epoch_is_another_permutation(batches: Batches):
    size = len(batches.sources[0])
    epochs = [order(batches, epoch * size, (epoch + 1) * size) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))
    other = replace(batches, seed=4)
    epochs += [order(other, epoch * size, (epoch + 1) * size) for epoch in range(3)]
    for i, left in enumerate(epochs):
        for right in epochs[:i]:
            assert sum(a == b for a, b in zip(left, right, strict=True)) < 15


def test_the_order_never_changes():
    """A run of last year continues in the order of last year, whatever the version of numpy."""
    shuffles = [_permutation(1000, f"meshgpt order 0  {epoch}") for epoch in (0, 1)]
    got = [shuffle(i) for shuffle in shuffles for i in (0, 1, 2, 999)]
    assert got == [120, 740, 661, 188, 294, 291, 969, 153]
    assert _permutation(10**12, "far")(123_456_789) == 79_878_995_887


def test_rows_are_the_same_whoever_asks(batches: Batches):
    for step in (0, 7, 1000):
        whole, weights = batches.rows(step, range(6))
        assert weights is None
        assert whole.dtype == np.int32
        assert whole.shape == (6, 65)
        assert np.array_equal(batches.rows(step, [4, 1])[0], whole[[4, 1]])
        for row, number in enumerate(order(batches, step * 6, step * 6 + 6)):
            assert np.array_equal(whole[row], record(batches.sources[0], number))
    with pytest.raises(IndexError, match="row 6"):
        batches.rows(0, [6])


def test_batch_size_does_not_change_the_order(batches: Batches):
    twice = replace(batches, sizes=BatchSizes.constant(12))
    halves = [batches.rows(step, range(6))[0] for step in (10, 11)]
    assert np.array_equal(twice.rows(5, range(12))[0], np.concatenate(halves))


def test_iterating_equals_asking_from_any_step(batches: Batches):
    for start, stop in ((0, 40), (17, 23), (5, 5)):
        got = list(batches.iterate(start, stop, [1, 3]))
        assert len(got) == stop - start
        for step, (rows, weights) in zip(range(start, stop), got, strict=True):
            assert weights is None
            assert np.array_equal(rows, batches.rows(step, [1, 3])[0])


def test_iterating_leaves_no_thread_behind(batches: Batches):
    before = set(threading.enumerate())
    iterator = batches.iterate(0, 10_000, range(6))
    next(iterator)
    iterator.close()
    deadline = time.monotonic() + 60
    while set(threading.enumerate()) - before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("seq_len", "global_batch"), [(64, 8), (17, 3), (1, 1000), (100_000, 2)])
def test_every_held_out_token_counts_once(splits: dict[str, Split], seq_len: int, global_batch: int):
    split = splits["val"]
    evaluation = EvalBatches(splits=(split,), seq_len=seq_len, global_batch=global_batch)
    targets, inputs = [], []
    for batch in range(len(evaluation)):
        tokens, weights = evaluation.rows(batch, range(global_batch))
        assert tokens.shape == (global_batch, seq_len + 1)
        assert weights.shape == (global_batch, seq_len)
        targets.append(tokens[:, 1:][weights == 1.0])
        inputs.append(tokens[:, :-1][weights == 1.0])
    everything = split.tokens(0, split.num_tokens)
    assert np.array_equal(np.concatenate(targets), everything)
    assert np.array_equal(np.concatenate(inputs), np.concatenate([[split.eot_id], everything[:-1]]))


@pytest.mark.parametrize(("seq_len", "global_batch"), [(64, 8), (17, 3), (100_000, 2)])
@pytest.mark.parametrize("order", [("val", "train"), ("train", "val"), ("val", "train", "val")])
def test_every_held_out_token_of_several_stores_counts_once(
    splits: dict[str, Split], order: tuple[str, ...], seq_len: int, global_batch: int
):
    """Validation of a mixture: end to end, whichever store a sequence begins or ends in."""
    chosen = tuple(splits[name] for name in order)
    everything = np.concatenate([split.tokens(0, split.num_tokens) for split in chosen])
    before = np.concatenate([[chosen[0].eot_id], everything[:-1]])
    evaluation = EvalBatches(splits=chosen, seq_len=seq_len, global_batch=global_batch)
    size = seq_len * global_batch
    assert len(evaluation) == -(-len(everything) // size)
    for batch in range(len(evaluation)):
        tokens, weights = evaluation.rows(batch, range(global_batch))
        here = slice(batch * size, min((batch + 1) * size, len(everything)))
        assert np.array_equal(tokens[:, 1:][weights == 1.0], everything[here])
        assert np.array_equal(tokens[:, :-1][weights == 1.0], before[here])


def test_text_shorter_than_a_sequence_is_refused(splits: dict[str, Split]):
    val = splits["val"]
    assert len(Sequences(val, val.num_tokens - 1)) == 1
    with pytest.raises(UserError, match=rf"the val split of .* has {val.num_tokens} tokens, fewer than .* --seq-len"):
        Sequences(val, val.num_tokens)
    with pytest.raises(UserError, match="seq_len 0"):
        Sequences(val, 0)
    with pytest.raises(UserError, match="global_batch 0"):
        single(Sequences(val, 8), 0, 0)
