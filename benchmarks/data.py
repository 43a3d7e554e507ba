"""Batches from a store, beside nanoGPT's memmap sampling, and the share of a training run that waits for data.

    python benchmarks/data.py [--store FOLDER] [--rows 64] [--seq-len 1024] [--seconds 3] [--sources 100] [--json FILE]

The first table is one process from the page cache: tokens a second through the whole pipeline (order, shuffle, gather,
read ahead by threads). nanoGPT's is its `get_batch`: random offsets, with replacement, a slice and a cast for each row.
The second is a training step of `--step-ms` milliseconds (a sleep, as a GPU's step is to the host): how long the loop
waits for the next batch.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import record

from meshgpt.data.batch_sizes import BatchSizes
from meshgpt.data.mixture import Schedule, Source, Stage
from meshgpt.data.pipeline import Batches
from meshgpt.data.prepare import Prepare, prepare
from meshgpt.data.records import Sequences
from meshgpt.data.store import Split, Store


def batches_of(split: Split, sources: int, seq_len: int, rows: int) -> Batches:
    """A pipeline over one split, as so many sources of equal weight."""
    names = tuple(f"source {i}" for i in range(sources))
    records = tuple(Sequences(split, seq_len) for _ in names)
    stage = Stage(sources=tuple(Source(store=name, name=name, max_epochs=0) for name in names))
    schedule = Schedule(
        (stage,), names, [split.num_tokens] * sources, [len(records[0])] * sources, BatchSizes.constant(rows)
    )
    return Batches(sources=records, names=names, schedule=schedule, seed=0, sizes=BatchSizes.constant(rows))


def nanogpt(split: Split, seq_len: int, rows: int) -> Callable[[], np.ndarray]:
    """nanoGPT's `get_batch` without torch: it makes the memmap anew for each batch, against a leak."""
    path, dtype = split.shards[0].path, split.tokens(0, 1).dtype
    rng = np.random.default_rng(0)

    def get_batch() -> np.ndarray:
        data = np.memmap(path, dtype=dtype, mode="r")
        starts = rng.integers(0, len(data) - seq_len, rows)
        x = np.stack([data[i : i + seq_len].astype(np.int64) for i in starts])
        y = np.stack([data[i + 1 : i + 1 + seq_len].astype(np.int64) for i in starts])
        return np.stack([x, y])

    return get_batch


def tokens_a_second(next_batch: Callable[[], object], tokens: int, seconds: float) -> float:
    """Speed of a source of batches, after a few to warm up."""
    for _ in range(5):
        next_batch()
    count, begun = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begun) < seconds:
        next_batch()
        count += 1
    return count * tokens / elapsed


def waiting(batches: Batches, rows: int, step_ms: float, seconds: float) -> float:
    """The share of a loop's time that it waits for the next batch."""
    steps = max(20, int(seconds * 1000 / step_ms))
    waited = 0.0
    iterator = batches.iterate(0, steps + 1, range(rows))
    next(iterator)
    begun = time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        next(iterator)
        waited += time.perf_counter() - asked
        time.sleep(step_ms / 1000)
    total = time.perf_counter() - begun
    iterator.close()
    return waited / total


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--store", type=Path, help="a store; one of the standard library is made if not given")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--sources", type=int, default=100)
    parser.add_argument("--step-ms", type=float, default=130.0, help="GPT-2 124M, 64 x 1024, on an H200: 130")
    asked = parser.parse_args()
    begun = record.begin("data", asked)
    speeds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if asked.store is None:
            request = Prepare(sources=("stdlib",), out=scratch + "/store", train_tokenizer="bpe", vocab_size=8192)
            store = prepare(request, lambda *_: None)
        else:
            store = Store.open(asked.store)
        split, tokens = store.split("train"), asked.rows * asked.seq_len
        split.tokens(0, split.num_tokens).sum()  # into the page cache
        print(f"{split.num_tokens:,} tokens, {asked.rows} rows of {asked.seq_len}")
        for sources in (1, asked.sources):
            batches = batches_of(split, sources, asked.seq_len, asked.rows)
            iterator = batches.iterate(0, 1 << 40, range(asked.rows))
            speed = tokens_a_second(lambda i=iterator: next(i), tokens, asked.seconds)
            iterator.close()
            speeds["one source" if sources == 1 else "mixture"] = speed
            print(f"meshgpt, {sources:>3} sources: {speed / 1e6:8.1f} million tokens/s")
        speed = speeds["nanoGPT"] = tokens_a_second(nanogpt(split, asked.seq_len, asked.rows), tokens, asked.seconds)
        print(f"nanoGPT's get_batch:  {speed / 1e6:8.1f} million tokens/s")
        share = waiting(batches_of(split, 1, asked.seq_len, asked.rows), asked.rows, asked.step_ms, asked.seconds)
        print(f"waiting for data in steps of {asked.step_ms:g} ms: {share:.3%} of the time")
        count = split.num_tokens
    begun.write({"store_tokens": count, "tokens_per_second": speeds, "waiting": share}, {})


if __name__ == "__main__":
    main()
