"""A split cut into records, each one sequence of a batch: T targets and the tokens that they are predicted from.

A record is a row of T + 1 tokens: the inputs are its first T, the targets its last T. The token before a document's
first is an end-of-text token, in the store and in every record.

Legend: T sequence length, R records, P pieces.
"""

import json
from functools import cached_property
from typing import Protocol, final

import numpy as np

from meshgpt.data.files import file_sha256
from meshgpt.data.packing import PIECE, plan_files
from meshgpt.data.store import Split, Store
from meshgpt.errors import UserError


class Records(Protocol):
    """What batches draw from.

    Attributes:
        split: whose tokens they are.
        seq_len: T.
        digest: changes when the same store is cut differently.
    """

    split: Split
    seq_len: int
    digest: str

    def __len__(self) -> int:
        """R."""
        ...

    def read(self, record: int, row: np.ndarray) -> int:
        """Writes a record into `row`, (T + 1,); gives how many targets count, the rest being padding."""
        ...

    def pieces(self, record: int) -> list[tuple[int, int]]:
        """The token ranges [start, stop) of the split that are a record's targets, in order."""
        ...

    def covering(self, start: int, stop: int) -> list[int]:
        """The records that have any of the tokens [start, stop) of the split among their targets."""
        ...


@final
class Sequences:
    """Concatenate and split: all documents end to end, cut every T tokens, as GPT-2 and GPT-J had it.

    Raises:
        UserError: the split is shorter than one record.
    """

    digest = "concatenate"

    def __init__(self, split: Split, seq_len: int):
        if seq_len < 1:
            raise UserError(f"seq_len {seq_len} must be at least 1")
        if split.num_tokens < seq_len + 1:
            raise UserError(
                f"the {split.name} split of {split.folder} has {split.num_tokens} tokens, fewer than one sequence of "
                f"seq_len {seq_len} (and its target) needs: lower --seq-len or prepare more text"
            )
        self.split = split
        self.seq_len = seq_len

    def __len__(self) -> int:
        return (self.split.num_tokens - 1) // self.seq_len

    def read(self, record: int, row: np.ndarray) -> int:
        start = record * self.seq_len
        row[:] = self.split.tokens(start, start + self.seq_len + 1)
        return self.seq_len

    def pieces(self, record: int) -> list[tuple[int, int]]:
        start = record * self.seq_len + 1
        return [(start, start + self.seq_len)]

    def covering(self, start: int, stop: int) -> list[int]:
        first, last = max(0, start - 1) // self.seq_len, (stop - 2) // self.seq_len
        return list(range(first, min(last + 1, len(self)))) if stop > 1 else []


@final
class Packed:
    """Best fit: whole documents side by side, as `packing.plan` laid them; what is over at the end is padding.

    Raises:
        UserError: the store has no such plan, or one that belongs to another store or was damaged.
    """

    def __init__(self, store: Store, split: Split, seq_len: int):
        files = plan_files(store.folder, split.name, seq_len)
        if not files.index.is_file():
            raise UserError(
                f"the store {store.folder} is not packed for sequences of {seq_len} tokens: run "
                f"`meshgpt data pack {store.folder} --seq-len {seq_len}`, or use data.packing 'concatenate'"
            )
        try:
            index = json.loads(files.index.read_text(encoding="utf-8"))
            made_for, digests = index["store"], index["sha256"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{files.index} is damaged ({error!r}): run `meshgpt data pack` again") from error
        if made_for != store.digest:
            raise UserError(f"{files.index} was made for another store: delete it and run `meshgpt data pack` again")
        for path in (files.pieces, files.offsets):
            if not path.is_file() or file_sha256(path) != digests[path.name]:
                raise UserError(f"{path} is missing or damaged: run `meshgpt data pack` again")
        self.split = split
        self.seq_len = seq_len
        self.digest = file_sha256(files.index)
        self._files = files

    @cached_property
    def _pieces(self) -> np.ndarray:
        rows = np.load(self._files.pieces, mmap_mode="r", allow_pickle=False)
        assert rows.dtype == PIECE
        return rows

    @cached_property
    def _offsets(self) -> np.ndarray:
        return np.load(self._files.offsets, mmap_mode="r", allow_pickle=False)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def read(self, record: int, row: np.ndarray) -> int:
        row[:] = self.split.eot_id
        at = 1
        for start, stop in self.pieces(record):
            row[at : at + stop - start] = self.split.tokens(start, stop)
            at += stop - start
        return at - 1

    def pieces(self, record: int) -> list[tuple[int, int]]:
        rows = self._pieces[self._offsets[record] : self._offsets[record + 1]]
        return [(int(start), int(start) + int(length)) for start, length in rows]

    def covering(self, start: int, stop: int) -> list[int]:
        touching = (self._pieces["start"] < stop) & (self._pieces["start"] + self._pieces["length"] > start)
        found = np.searchsorted(self._offsets, np.flatnonzero(touching), side="right") - 1
        return sorted({int(record) for record in found})
