"""Best-fit packing: documents side by side in records of T tokens, few of them cut, hardly any padding.

A document longer than T is cut every T tokens, which fills whole records; what is over goes, longest first, where it
leaves the least room (best-fit decreasing: Ding et al. 2024, "Fewer Truncations Improve Language Modeling"). Pieces of
one length are placed together, so the time does not grow with the number of pieces squared, nor much with it at all.
Where more than 1% padding would be left, the emptiest records are dissolved and their pieces concatenated and split.

A plan lies beside its store, in three files: pieces, the first piece of each record, and an index with digests, which
is written last. Legend: P pieces, R records.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from meshgpt.atomic import replacing, write_atomically
from meshgpt.data.files import file_sha256
from meshgpt.data.store import Store
from meshgpt.errors import UserError, explained
from meshgpt.settings import json_text

PIECE = np.dtype([("start", "<i8"), ("length", "<u4")])
MAX_PADDING = 0.01


class PlanFiles(NamedTuple):
    """Where a plan lies."""

    pieces: Path
    offsets: Path
    index: Path


@dataclass(frozen=True, kw_only=True)
class Packing:
    """What `pack` did. cut_documents: how many that fit a record were cut all the same."""

    records: int
    padding: float
    cut_documents: int


def plan_files(folder: Path, split: str, seq_len: int) -> PlanFiles:
    """The names of a plan's files."""
    stem = f"{split}.best_fit-{seq_len}"
    return PlanFiles(folder / f"{stem}.npy", folder / f"{stem}.offsets.npy", folder / f"{stem}.json")


def pack(store: Store, seq_len: int) -> Packing:
    """Packs a store's train split for sequences of `seq_len` tokens and leaves the plan beside it.

    Memory: about 60 bytes a document or record, whichever are more.

    Raises:
        UserError: nothing to pack, or a folder that cannot be written.
    """
    split = store.split("train")
    if seq_len < 1:
        raise UserError(f"seq_len {seq_len} must be at least 1")
    if not split.num_tokens:
        raise UserError(f"the train split of {store.folder} is empty: there is nothing to pack")
    ends = np.array(split.documents["end"])
    pieces, offsets = plan(ends, seq_len)
    cut = _count_cut(ends, pieces, seq_len)
    records = len(offsets) - 1
    packing = Packing(records=records, padding=1 - split.num_tokens / (records * seq_len), cut_documents=cut)
    files = plan_files(store.folder, split.name, seq_len)
    try:
        files.index.unlink(missing_ok=True)
        for path, array in ((files.pieces, pieces), (files.offsets, offsets)):
            with replacing(path) as scratch, scratch.open("wb") as file:
                np.save(file, array)
        index = {
            "store": store.digest,
            "seq_len": seq_len,
            "records": records,
            "padding": packing.padding,
            "cut_documents": cut,
            "sha256": {path.name: file_sha256(path) for path in (files.pieces, files.offsets)},
        }
        write_atomically(files.index, json_text(index, indent=1) + "\n")
    except OSError as error:
        raise explained(error, f"cannot write the plan beside the store {store.folder}: {error}") from error
    return packing


def plan(ends: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces (P,) of `PIECE` in the order of records, and (R + 1,) int64: where each record's pieces begin.

    Args:
        ends: (documents,), where each document of the split ends.
        seq_len: T.
    """
    starts = np.concatenate([[0], ends[:-1]])
    lengths = ends - starts
    full = lengths // seq_len
    first = np.repeat(np.cumsum(full) - full, full)  # of each full chunk's document, its first chunk's number
    chunks = np.repeat(starts, full) + (np.arange(full.sum()) - first) * seq_len
    over = np.flatnonzero(lengths % seq_len)
    tail_starts, tails = (starts + full * seq_len)[over], (lengths % seq_len)[over]
    bins = _best_fit(tails, seq_len)
    loose = _emptiest(bins, tails, seq_len, len(chunks))
    kept = ~np.isin(bins, loose)
    order = np.lexsort((tail_starts[kept], bins[kept]))
    packed = _pieces(tail_starts[kept][order], tails[kept][order])
    openings = np.flatnonzero(np.diff(bins[kept][order], prepend=-1))
    split_pieces, split_openings = _concatenate_and_split(tail_starts[~kept], tails[~kept], seq_len)
    pieces = np.concatenate([_pieces(chunks, np.full(len(chunks), seq_len)), packed, split_pieces])
    offsets = np.concatenate(
        [
            np.arange(len(chunks)),
            len(chunks) + openings,
            len(chunks) + len(packed) + split_openings,
            [len(pieces)],
        ]
    )
    return pieces, offsets.astype(np.int64)


def _best_fit(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """The bin of each piece, (pieces,) int64; bins hold seq_len tokens."""
    bins = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    borders = np.flatnonzero(np.diff(lengths[order], prepend=-1))
    room: list[list[np.ndarray]] = [[] for _ in range(seq_len + 1)]  # bins by what still fits into them
    count = np.zeros(seq_len + 1, np.int64)
    opened = 0
    for group in np.split(order, borders[1:]) if len(order) else []:
        length = int(lengths[group[0]])
        while len(group):
            fitting = np.flatnonzero(count[length:])
            if fitting.size:
                space = length + int(fitting[0])
                stack = room[space].pop()
                taken, rest = stack[: len(group)], stack[len(group) :]
                if len(rest):
                    room[space].append(rest)
                count[space] -= len(taken)
            else:
                space = seq_len
                taken = np.arange(opened, opened + -(-len(group) // (seq_len // length)))
                opened += len(taken)
            bins[group[: len(taken)]] = taken
            group = group[len(taken) :]
            room[space - length].append(taken)
            count[space - length] += len(taken)
    return bins


def _emptiest(bins: np.ndarray, lengths: np.ndarray, seq_len: int, full: int) -> np.ndarray:
    """The fewest bins, emptiest first, that have to be concatenated and split for the padding to be below the limit."""
    if not len(bins):
        return np.empty(0, np.int64)
    fill = np.bincount(bins, weights=lengths).astype(np.int64)
    order = np.argsort(fill, kind="stable")
    tokens = np.concatenate([[0], np.cumsum(fill[order])])  # in the k emptiest bins
    records = -(-tokens // seq_len)  # that these make when concatenated
    kept = len(fill) - np.arange(len(fill) + 1)
    total = full + kept + records
    padding = total * seq_len - (full * seq_len + fill.sum())
    enough = np.flatnonzero(padding < MAX_PADDING * total * seq_len)
    return order[: enough[0] if enough.size else len(order)]


def _concatenate_and_split(starts: np.ndarray, lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces end to end, cut every seq_len tokens; and which pieces open a record."""
    order = np.argsort(starts, kind="stable")
    starts, lengths = starts[order], lengths[order]
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(np.arange(0, total, seq_len), ends)  # every place where a piece begins, and the end
    begins = cuts[:-1]
    source = np.searchsorted(ends, begins, side="right")
    pieces = _pieces(starts[source] + begins - (ends - lengths)[source], np.diff(cuts))
    return pieces, np.flatnonzero(begins % seq_len == 0)


def _pieces(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    pieces = np.empty(len(starts), PIECE)
    pieces["start"], pieces["length"] = starts, lengths
    return pieces


def _count_cut(ends: np.ndarray, pieces: np.ndarray, seq_len: int) -> int:
    """How many documents of at most seq_len tokens do not lie in one piece."""
    starts = np.concatenate([[0], ends[:-1]])
    document = np.searchsorted(ends, pieces["start"], side="right")
    parts = np.bincount(document, minlength=len(ends))
    return int(np.sum((parts > 1) & (ends - starts <= seq_len)))
