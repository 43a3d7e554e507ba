"""Mixtures: proportions at any point, budgets to the sequence, stages, the inverse, and what cannot be."""

import sysconfig
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshgpt.data.batch_sizes import BatchSizes
from meshgpt.data.mixture import Interleave, Schedule, Source, Stage, check_stages, integer_weights
from meshgpt.data.permutation import Permutation
from meshgpt.data.pipeline import Batches
from meshgpt.data.prepare import Prepare, prepare
from meshgpt.data.records import Sequences
from meshgpt.data.store import Store
from meshgpt.errors import UserError


@given(size=st.integers(1, 3000), key=st.text(max_size=5))
@settings(max_examples=60, deadline=None)
def test_a_permutation_is_one_and_has_an_inverse(size: int, key: str):
    permutation = Permutation(size, key)
    there = [permutation(i) for i in range(size)]
    assert sorted(there) == list(range(size))
    assert [permutation.inverse(element) for element in there] == list(range(size))


def test_a_permutation_looks_random():
    """Against what chance gives: fixed points, runs, correlation with the identity and with its neighbour."""
    for size in (997, 4096, 100_003):
        there = np.array([*map(Permutation(size, f"some key {size}"), range(size))])
        assert np.sum(there == np.arange(size)) < 8
        assert np.sum(np.diff(there) == 1) < 8
        for other in (np.arange(size), np.roll(there, 1), np.roll(there, size // 2)):
            assert abs(np.corrcoef(there, other)[0, 1]) < 5 / size**0.5
        cells = np.histogram2d(np.arange(size), there, bins=8)[0]
        assert abs(np.sum((cells - size / 64) ** 2 / (size / 64)) - 49) < 5 * (2 * 49) ** 0.5  # chi squared


@given(weights=st.lists(st.floats(0.001, 1000), min_size=1, max_size=120), far=st.integers(0, 10**9))
@settings(max_examples=25, deadline=None)
def test_every_share_is_right_at_any_point(weights: list[float], far: int):
    turns, wanted = Interleave(integer_weights(weights)), np.array(weights) / sum(weights)
    source_n, nth_n = turns.locate(np.arange(30_000))
    for source, share in enumerate(wanted):
        mine = np.flatnonzero(source_n == source)
        assert np.array_equal(nth_n[mine], np.arange(len(mine)))
        counts = np.cumsum(source_n == source)
        realised = counts[10_000:] / np.arange(10_001, 30_001)
        assert np.abs(realised - share).max() <= 0.001
        for number in mine[:: max(1, len(mine) // 5)]:
            assert turns.find(source, int(nth_n[number])) == number
        assert turns.count(source, 20_000) == counts[19_999]
        assert abs(turns.count(source, far) - share * far) <= 0.001 * max(far, 10_000)
    source, nth = (int(value[0]) for value in turns.locate(np.array([far])))
    assert turns.find(source, nth) == far


@given(shares=st.lists(st.integers(1, 60), min_size=1, max_size=40))
@settings(max_examples=40, deadline=None)
def test_budgets_are_spent_to_the_sequence(shares: list[int]):
    source_n, _ = Interleave(shares).locate(np.arange(sum(shares)))
    assert np.bincount(source_n, minlength=len(shares)).tolist() == shares


def schedule_of(*stages: Stage, tokens: dict[str, int], global_batch: int = 8, seq_len: int = 1024) -> Schedule:
    check_stages(stages)
    lengths = [(count - 1) // seq_len for count in tokens.values()]
    return Schedule(stages, tuple(tokens), tuple(tokens.values()), lengths, BatchSizes.constant(global_batch))


def test_the_mixture_of_gpt2_023():
    """1.3B tokens of Common Crawl, 540M of arXiv, 390M of GitHub, in 512 x 1,024 tokens a step."""
    budgets = {"cc": 1_300_000_000, "arxiv": 540_000_000, "github": 390_000_000}
    stage = Stage(sources=tuple(Source(store=f"stores/{name}", tokens=count) for name, count in budgets.items()))
    schedule = schedule_of(stage, tokens={name: count + 1 for name, count in budgets.items()}, global_batch=512)
    steps = sum(count // 1024 for count in budgets.values()) // 512
    assert steps == 4253
    schedule.check(steps * 512)
    for total in (10_000, 1_000_000, steps * 512):
        for used, budget in zip(schedule.used(total), budgets.values(), strict=True):
            assert used / total == pytest.approx(budget / sum(budgets.values()), abs=0.001)
    with pytest.raises(UserError, match=r"2,252,800 sequences and the mixture's token budgets end after 2,177,733"):
        schedule.check(4400 * 512)
    by_weight = Stage(sources=tuple(replace(s, tokens=0, weight=s.tokens, max_epochs=1.04) for s in stage.sources))
    more = schedule_of(by_weight, tokens={name: count + 1 for name, count in budgets.items()}, global_batch=512)
    more.check(4400 * 512)
    with pytest.raises(UserError, match=r"goes 1\.034 times through the source 'cc', whose max_epochs is 1"):
        schedule_of(
            Stage(sources=tuple(replace(source, max_epochs=1.0) for source in by_weight.sources)),
            tokens={name: count + 1 for name, count in budgets.items()},
        ).check(4400 * 512)


def test_two_subsets_one_after_another():
    """gpt2-medium-4096: one subset to a step, then another; a source that returns goes on where it stopped."""
    first, second = Source(store="a", max_epochs=0), Source(store="b", max_epochs=0)
    both = Stage(sources=(first, second))
    schedule = schedule_of(Stage(sources=(first,), until_step=10), Stage(sources=(second,), until_step=20), both,
                           tokens={"a": 10**6, "b": 10**6})  # fmt: skip
    source_n, nth_n = schedule.locate(np.arange(300))
    assert set(source_n[:80]) == {0}
    assert set(source_n[80:160]) == {1}
    for source in (0, 1):
        mine = np.flatnonzero(source_n == source)
        assert np.array_equal(nth_n[mine], np.arange(len(mine)))
        assert [schedule.find(source, nth) for nth in range(len(mine))] == mine.tolist()
    assert schedule.used(200) == [100, 100]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Source(store="a", weight=0), r"source 'a': weight 0 must be a positive"),
        (lambda: Source(store="a", weight=-2.0), r"source 'a': weight -2.0"),
        (lambda: Source(store="a", weight=float("nan")), r"weight=nan"),
        (lambda: Source(store="a", tokens=-1), r"source 'a': tokens -1"),
        (lambda: Source(store="a", tokens=5, weight=2.0), r"both a weight \(2.0\) and tokens \(5\)"),
        (lambda: Source(store="a", max_epochs=-1), r"max_epochs -1"),
        (lambda: Source(store=""), "names no store"),
        (lambda: Stage(sources=()), "no source"),
        (lambda: Stage(sources=(Source(store="x/a"), Source(store="y/a"))), r"names 'a' twice"),
        (lambda: Stage(sources=(Source(store="a", name="p"), Source(store="a", name="q"))), r"names 'a' twice"),
        (lambda: Stage(sources=(Source(store="a", tokens=5), Source(store="b"))), r"b has no tokens"),
        (lambda: Stage(sources=(Source(store="a", tokens=5),), until_step=5), r"until_step 5: a stage with token"),
        (lambda: Stage(sources=(Source(store="a"),), until_step=-5), r"until_step -5"),
        (lambda: check_stages([Stage(sources=(Source(store="a"),))] * 2), r"stage 1 of 2 has no end"),
        (lambda: check_stages([Stage(sources=(Source(store="a"),), until_step=3)] * 2), r"3, not after the one before"),
        (
            lambda: check_stages(
                [Stage(sources=(Source(store=f"{s}/a"),), until_step=n) for n, s in enumerate("xy", start=1)]
            ),
            r"'a' stands for x/a and y/a",
        ),
        (
            lambda: schedule_of(Stage(sources=(Source(store="a", tokens=2000),)), tokens={"a": 1500}, seq_len=10),
            r"the budget of source 'a', 2,000 tokens, is larger than what a gives: 1,500 at max_epochs 1",
        ),
        (
            lambda: schedule_of(Stage(sources=(Source(store="a", tokens=5),)), tokens={"a": 1500}, seq_len=10),
            r"the budget of source 'a', 5 tokens, is less than one sequence",
        ),
    ],
)
def test_mixtures_that_cannot_be(make, message: str):
    with pytest.raises(UserError, match=message):
        make()


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Store]:
    folder, made = tmp_path_factory.mktemp("stores"), []
    for name in ("asyncio", "email", "json"):
        config = Prepare(
            sources=(str(Path(sysconfig.get_path("stdlib")) / name),),
            extensions=(".py",),
            out=str(folder / name),
            tokenizer=str(folder / "asyncio" / "tokenizer") if made else None,
            train_tokenizer=None if made else "bpe",
            vocab_size=None if made else 400,
            val_fraction=0.0,
            workers=1,
        )
        made.append(prepare(config, lambda *_: None))
    return made


def mixed(stores: list[Store], weights: list[float], seq_len: int, seed: int, global_batch: int) -> Batches:
    sources = [Source(store=str(s.folder), weight=w, max_epochs=0) for s, w in zip(stores, weights, strict=True)]
    records = tuple(Sequences(store.split("train"), seq_len) for store in stores)
    names = tuple(source.label for source in sources)
    tokens = [store.split("train").num_tokens for store in stores]
    stage = Stage(sources=tuple(sources))
    schedule = Schedule((stage,), names, tokens, [len(r) for r in records], BatchSizes.constant(global_batch))
    return Batches(sources=records, names=names, schedule=schedule, seed=seed, sizes=BatchSizes.constant(global_batch))


def test_a_mixture_reads_each_source_in_its_own_epochs(stores: list[Store]):
    batches = mixed(stores, [5, 3, 2], 64, 7, 10)
    rows = np.concatenate([batches.rows(step, range(10))[0] for step in range(150)])
    source_n, record_n = batches.locate(np.arange(1500))
    for source, records in enumerate(batches.sources):
        mine = np.flatnonzero(source_n == source)
        everything = records.split.tokens(0, records.split.num_tokens)
        for number in mine:
            start = int(record_n[number]) * 64
            assert np.array_equal(rows[number], everything[start : start + 65])
        for epoch in range(len(mine) // len(records)):
            seen = record_n[mine[epoch * len(records) : (epoch + 1) * len(records)]]
            assert sorted(seen.tolist()) == list(range(len(records)))
        for record in (0, len(records) - 1):
            expected = np.flatnonzero((source_n == source) & (record_n == record)).tolist()
            assert batches.sequences_with(source, record, 1500) == expected
    assert len(np.unique(source_n)) == 3


def test_a_source_keeps_its_order_whatever_it_is_mixed_with(stores: list[Store]):
    alone, pair = mixed(stores[:1], [1], 64, 7, 4), mixed(stores[:2][::-1], [1, 1], 64, 7, 6)
    source_n, record_n = pair.locate(np.arange(400))
    mine = record_n[source_n == 1]
    assert mine.tolist() == alone.locate(np.arange(len(mine)))[1].tolist()


def test_a_hundred_sources_take_the_memory_of_one(stores: list[Store]):
    def peak(count: int) -> int:
        tracemalloc.start()
        records = tuple(Sequences(stores[0].split("train"), 64) for _ in range(count))
        names = tuple(f"s{i}" for i in range(count))
        stage = Stage(sources=tuple(Source(store=name, name=name, max_epochs=0) for name in names))
        lengths = [len(r) for r in records]
        schedule = Schedule((stage,), names, [r.split.num_tokens for r in records], lengths, BatchSizes.constant(64))
        batches = Batches(sources=records, names=names, schedule=schedule, seed=0, sizes=BatchSizes.constant(64))
        for step in range(20):
            batches.rows(step, range(64))
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(1)
    assert peak(100) < peak(1) + (1 << 20)
