"""`meshgpt data ...`: what a run saw and sees, which documents, and a look at a store."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from meshgpt import flags
from meshgpt.config import Run
from meshgpt.data import inspect as inspection
from meshgpt.data.packing import pack as pack_store
from meshgpt.data.store import Split, Store
from meshgpt.data.tokenizer import Tokenizer
from meshgpt.errors import UserError
from meshgpt.settings import settings
from meshgpt.training.data import RunData, open_run
from meshgpt.training.trackers import progress_bar

_DECODED = 1 << 16  # tokens turned into text at a time, when searching
Place = Annotated[Path, tyro.conf.Positional]


@settings()
class OrderArguments:
    """The digest of what each step sees: equal digests, equal tokens, on any machine."""

    run: Place
    """A run's folder."""
    from_step: int = 1
    """First step to show, counted from 1."""
    to_step: int = 0
    """Last step to show; 0 is the run's last."""


@settings()
class ShowArguments:
    """The text of a step's batch, row by row, with the names of its documents."""

    run: Place
    """A run's folder."""
    step: int
    """Step to show, counted from 1 as in the run's metrics."""
    row: int | None = None
    """Row of the batch to show, counted from 0; None shows all."""


@settings()
class FindArguments:
    """The documents that contain a text, and the steps that see it."""

    where: Place
    """A token store, or a run's folder."""
    text: Annotated[str, tyro.conf.Positional]
    """Text to look for."""
    run: Path | None = None
    """Folder of the run whose steps are named, where `where` is a store; None names no steps."""
    limit: int = 20
    """Number of documents after which the search stops."""


@settings()
class InspectArguments:
    """Documents, tokens, lengths, common tokens and samples of a store, as text and as a picture."""

    store: Place
    """A token store."""
    samples: int = 3
    """Number of samples of its text to show."""
    png: Path | None = None
    """File to write the picture to; None takes inspect.png in the store's folder."""


@settings()
class PackArguments:
    """Packs whole documents side by side into sequences, for data.packing 'best_fit'."""

    store: Place
    """A token store."""
    seq_len: int
    """Number of tokens in a packed sequence."""


def order(arguments: Sequence[str]) -> None:
    """meshgpt data order RUN --from-step A --to-step B"""
    asked = flags.parse(OrderArguments, arguments, "meshgpt data order")
    run, data = open_run(asked.run)
    last = asked.to_step or run.last_step
    if not 1 <= asked.from_step <= last:
        raise UserError(f"--from-step {asked.from_step} --to-step {last}: give steps from 1, the first not the larger")
    for step in range(asked.from_step, last + 1):
        print(f"{step} {data.batches.digest(step - 1)}")


def show(arguments: Sequence[str]) -> None:
    """meshgpt data show RUN --step N"""
    asked = flags.parse(ShowArguments, arguments, "meshgpt data show")
    _, data = open_run(asked.run)
    if asked.step < 1:
        raise UserError(f"--step {asked.step}: steps are counted from 1")
    size = data.batches.sizes.at(asked.step - 1)
    if asked.row is not None and not 0 <= asked.row < size:
        raise UserError(f"--row {asked.row}: the batch has rows 0 to {size - 1}")
    tokenizer = data.tokenizer()
    rows = range(size) if asked.row is None else [asked.row]
    sequences = data.batches.sizes.before(asked.step - 1) + np.asarray(rows)
    for row, source, record in zip(rows, *(column.tolist() for column in data.batches.locate(sequences)), strict=True):
        records, name = data.batches.sources[source], data.batches.names[source]
        print(f"=== step {asked.step}, row {row}{f', source {name}' if name else ''}")
        for start, stop in records.pieces(record):
            for title, text in _documents_in(records.split, start, stop, tokenizer):
                print(f"--- {title}\n{text}")


def find(arguments: Sequence[str]) -> None:
    """meshgpt data find STORE TEXT"""
    asked = flags.parse(FindArguments, arguments, "meshgpt data find")
    if not asked.text:
        raise UserError("which text? An empty one is everywhere")
    run_path = asked.where if (asked.where / "run.json").is_file() else asked.run
    run, data = (None, None) if run_path is None else open_run(run_path)
    stores = [Store.open(asked.where)] if data is None or run_path != asked.where else list(data.stores.values())
    found = 0
    for store in stores:
        for name in ("train", "val"):
            split = store.split(name)
            for number, start, stop in _search(split, asked.text, store.tokenizer()):
                begin = split.document_range(number)[0]
                place = f"document {number}: {split.document_name(number)}"
                print(f"{store.folder} {name}, {place}, tokens {start - begin:,} to {stop - begin - 1:,}")
                if run is not None and data is not None and name == "train":
                    print(f"  {_steps(run, data, store, start, stop)}")
                found += 1
                if found == asked.limit:
                    print(f"stopped after {found} documents: raise --limit for more")
                    return
    print(f"{found} documents contain it" if found else "no document contains it")


def inspect(arguments: Sequence[str]) -> None:
    """meshgpt data inspect STORE"""
    asked = flags.parse(InspectArguments, arguments, "meshgpt data inspect")
    store = Store.open(asked.store)
    looks = [inspection.look(store, name, samples=asked.samples) for name in ("train", "val")]
    print(inspection.as_text(store, looks))
    png = asked.png or store.folder / "inspect.png"
    inspection.as_picture(store, looks, png)
    print(f"picture: {png}")


def pack(arguments: Sequence[str]) -> None:
    """meshgpt data pack STORE --seq-len N"""
    asked = flags.parse(PackArguments, arguments, "meshgpt data pack")
    done = pack_store(Store.open(asked.store), asked.seq_len)
    print(
        f"{done.records:,} sequences of {asked.seq_len} tokens, {done.padding:.3%} padding, "
        f"{done.cut_documents:,} documents cut that would have fit: train with --data.packing best_fit"
    )


def _documents_in(split: Split, start: int, stop: int, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """(title, text) of each document's part of tokens [start, stop)."""
    for number in range(split.document_at(start), split.document_at(stop - 1) + 1):
        begin, end = split.document_range(number)
        first, last = max(begin, start), min(end, stop)
        title = f"document {number}: {split.document_name(number)}, tokens {first - begin:,} to {last - begin - 1:,}"
        yield f"{title} of {end - begin:,}", tokenizer.decode(split.tokens(first, last))


def _search(split: Split, text: str, tokenizer: Tokenizer) -> Iterator[tuple[int, int, int]]:
    """(document, first token, end) of the first place of `text` in each document that contains it."""
    number = 0
    with progress_bar() as report:
        while number < split.num_documents:
            begin = split.document_range(number)[0]
            last = max(number + 1, split.document_at(min(begin + _DECODED, split.num_tokens - 1)))
            if text in tokenizer.decode(split.tokens(begin, split.document_range(last - 1)[1])):
                for each in range(number, last):
                    place = _place(split, each, text, tokenizer)
                    if place is not None:
                        yield (each, *place)
            number = last
            report(f"searching {split.name}", split.document_range(number - 1)[1], split.num_tokens)


def _place(split: Split, number: int, text: str, tokenizer: Tokenizer) -> tuple[int, int] | None:
    """The tokens of the first place of `text` in a document, by bisection; None where there is none."""
    begin, end = split.document_range(number)
    tokens = split.tokens(begin, end - 1)
    if text not in tokenizer.decode(tokens):
        return None
    low, high = 0, len(tokens)  # text is in tokens[:high], and not in tokens[:low]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if text in tokenizer.decode(tokens[:middle]) else (middle, high)
    first, beyond = 0, high  # text is in tokens[first:high], and not in tokens[beyond:high]
    while beyond - first > 1:
        middle = (first + beyond) // 2
        first, beyond = (middle, beyond) if text in tokenizer.decode(tokens[middle:high]) else (first, middle)
    return begin + first, begin + high


def _steps(run: Run, data: RunData, store: Store, start: int, stop: int) -> str:
    """Which steps of a run see tokens [start, stop) of a store."""
    sizes = data.batches.sizes
    total = sizes.before(run.last_step)
    seen = set()
    for source, one in enumerate(data.stores.values()):
        if one.digest == store.digest:
            for record in data.batches.sources[source].covering(start, stop):
                seen |= {sizes.step_of(n) + 1 for n in data.batches.sequences_with(source, record, total)}
    steps = ", ".join(f"{step:,}" for step in sorted(seen))
    return f"seen by step {steps} of {run.last_step:,}" if seen else f"not seen in {run.last_step:,} steps"
