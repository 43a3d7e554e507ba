"""Writes a token store in order, so that it can be cut off anywhere and go on from the last commit."""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from meshgpt.atomic import replacing, write_atomically
from meshgpt.data.documents import Fragment
from meshgpt.data.files import chunks, file_sha256
from meshgpt.data.sources import Position, ReadBlock
from meshgpt.data.worker import DOCUMENT, SHOWN_BAD, SPLITS, SplitPart, Tokenized
from meshgpt.settings import json_text

JOURNAL = "journal.json"
SOURCES = "sources.jsonl"
_COPY_BYTES = 1 << 20
GZIP_BYTES = 64 << 20  # of the held-out text that gzip is tried on: at 20 MB/s more would hold up a large corpus


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What was counted on the way.

    first_bad: what was wrong with the first bad records. unknown_tokens, lost_characters, lossy_documents,
    lossy_held_out: `worker.Losses`, of duplicates too. in_both: documents of the sources whose text is in the held-out
    sources too, and were left out.
    """

    replaced: int = 0
    replaced_documents: int = 0
    unknown_tokens: int = 0
    lost_characters: int = 0
    lossy_documents: int = 0
    lossy_held_out: int = 0
    bad_records: int = 0
    first_bad: tuple[str, ...] = ()
    duplicates: int = 0
    duplicate_bytes: int = 0
    in_both: int = 0
    in_both_bytes: int = 0

    def entries(self) -> dict[str, Any]:
        """For the index, which has what is rare only where it is so."""
        return {name: n for name, n in asdict(self).items() if n or name not in ("in_both", "in_both_bytes")}


class Appender:
    """A file that only grows, with its size and sha256; opening it cuts it back to `size`."""

    def __init__(self, path: Path, size: int = 0):
        self.path = path
        self._hash = hashlib.sha256()
        self._file = open(path, "r+b" if size else "wb")  # noqa: SIM115 (closed by close)
        self.size = size
        left = size
        while left:
            data = self._file.read(min(left, _COPY_BYTES))
            if not data:
                raise OSError(f"{path} is shorter than the {size} bytes that were committed")
            self._hash.update(data)
            left -= len(data)
        self._file.truncate(size)

    def append(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


class SplitWriter:
    """The shards and the document table of one split.

    Every shard but the last holds exactly `shard_tokens` tokens. The table grows as ``<split>.documents`` and becomes
    ``<split>.documents.npy`` in `finish`.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int, state: dict[str, Any] | None):
        self._folder, self._split = folder, split
        self._shard_bytes = shard_tokens * dtype.itemsize
        self._itemsize = dtype.itemsize
        self.shards: list[dict[str, Any]] = [] if state is None else state["shards"]
        self.num_bytes = 0 if state is None else state["num_bytes"]
        self._shard = self._open_shard(0 if state is None else state["shard_size"])
        self._table = Appender(folder / f"{split}.documents", 0 if state is None else state["table_size"])
        self._open_bytes = 0  # of the document that is still being written

    @property
    def num_tokens(self) -> int:
        return sum(shard["num_tokens"] for shard in self.shards) + self._shard.size // self._itemsize

    @property
    def num_documents(self) -> int:
        return self._table.size // DOCUMENT.itemsize

    def digests(self) -> Iterator[bytes]:
        """`document_digest` of every document so far."""
        self._table.sync()
        yield from (row.tobytes() for row in np.fromfile(self._table.path, DOCUMENT)["digest"])

    def append(self, part: SplitPart, *, closes: bool) -> None:
        """Adds a block's part; when it does not close its document, the row waits for the part that does."""
        start = self.num_tokens
        data = memoryview(part.tokens)
        while data:
            room = self._shard_bytes - self._shard.size
            self._shard.append(bytes(data[:room]))
            data = data[room:]
            if self._shard.size == self._shard_bytes:
                self._close_shard()
                self._shard = self._open_shard(0)
        rows = part.documents.copy()
        size = int(rows["bytes"].sum())
        self.num_bytes += size
        if not closes:
            self._open_bytes += size
            return
        rows["end"] += start
        if len(rows) and self._open_bytes:
            rows["bytes"][0] += self._open_bytes
            self._open_bytes = 0
        self._table.append(rows.tobytes())

    def commit(self) -> dict[str, Any]:
        """Brings everything to disk and returns the state that `__init__` takes."""
        self._shard.sync()
        self._table.sync()
        return {
            "shards": self.shards,
            "shard_size": self._shard.size,
            "table_size": self._table.size,
            "num_bytes": self.num_bytes,
        }

    def close(self) -> None:
        """Closes the files, leaving them as they are."""
        self._shard.close()
        self._table.close()

    def finish(self) -> dict[str, Any]:
        """Closes everything; the split's entry of the index."""
        num_documents, num_tokens = self.num_documents, self.num_tokens
        if self._shard.size:
            self._close_shard()
        else:
            self._shard.close()
            self._shard.path.unlink()
        self._table.close()
        table = self._folder / f"{self._split}.documents.npy"
        with replacing(table) as scratch, scratch.open("wb") as out:
            header = {"descr": DOCUMENT.descr, "fortran_order": False, "shape": (num_documents,)}
            np.lib.format.write_array_header_1_0(out, header)
            for data in chunks(self._table.path):
                out.write(data)
        return {
            "num_tokens": num_tokens,
            "num_documents": num_documents,
            "num_bytes": self.num_bytes,
            "documents": {"file": table.name, "sha256": file_sha256(table)},
            "shards": self.shards,
        }

    def _open_shard(self, size: int) -> Appender:
        return Appender(self._folder / f"{self._split}-{len(self.shards):05d}.bin", size)

    def _close_shard(self) -> None:
        shard = self._shard
        shard.close()
        self.shards.append(
            {"file": shard.path.name, "num_tokens": shard.size // self._itemsize, "sha256": shard.sha256}
        )


class StoreWriter:
    """Both splits, the list of source files, and the journal that says how far everything is.

    Args:
        held: digests of the documents that are left out of training, since held-out sources hold their text.
        hold_out: for the journal, where it was decided by `held_out`.
    """

    def __init__(
        self,
        folder: Path,
        dtype: np.dtype,
        shard_tokens: int,
        deduplicate: bool,
        held: Set[bytes] = frozenset(),
        hold_out: dict[str, Any] | None = None,
    ):
        self._folder = folder
        self._held = held
        self._hold_out = hold_out
        self._dtype = dtype
        journal = folder / JOURNAL
        state = json.loads(journal.read_text()) if journal.exists() else None
        self.position = Position() if state is None else Position(**state["position"])
        self.counts = Counts() if state is None else _counts(state["counts"])
        splits = dict.fromkeys(SPLITS) if state is None else state["splits"]
        self._splits = {split: SplitWriter(folder, split, dtype, shard_tokens, splits[split]) for split in SPLITS}
        self._sources = Appender(folder / SOURCES, 0 if state is None else state["sources_size"])
        self._val_text = Appender(folder / "val.text", 0 if state is None else state["val_text_size"])
        self._between_documents = True
        self._dropping = False  # the long document that is being read
        self._seen: set[bytes] | None = None
        if deduplicate:
            self._seen = {digest for split in self._splits.values() for digest in split.digests()}

    @property
    def num_tokens(self) -> int:
        return sum(split.num_tokens for split in self._splits.values())

    def append(self, read: ReadBlock, result: Tokenized) -> None:
        """Adds the next block."""
        fragment = read.block.fragment
        self._between_documents = fragment is None or fragment.closes
        if self._held:
            result = self._without_held(result)
        if self._seen is not None:
            result = self._without_duplicates(result, fragment, self._seen)
        for split in SPLITS:
            self._splits[split].append(result.parts[split], closes=self._between_documents)
        self._val_text.append(result.val_text[: GZIP_BYTES - self._val_text.size])
        for digest in read.finished:
            self._sources.append(json_text(asdict(digest), ensure_ascii=False).encode() + b"\n")
        self.counts = Counts(
            replaced=self.counts.replaced + result.replaced,
            replaced_documents=self.counts.replaced_documents + result.replaced_documents,
            unknown_tokens=self.counts.unknown_tokens + result.losses.unknown,
            lost_characters=self.counts.lost_characters + result.losses.characters,
            lossy_documents=self.counts.lossy_documents + result.losses.documents,
            lossy_held_out=self.counts.lossy_held_out + result.losses.held_out,
            bad_records=self.counts.bad_records + result.bad_records,
            first_bad=(*self.counts.first_bad, *result.first_bad)[:SHOWN_BAD],
            duplicates=self.counts.duplicates,
            duplicate_bytes=self.counts.duplicate_bytes,
            in_both=self.counts.in_both,
            in_both_bytes=self.counts.in_both_bytes,
        )
        self.position = read.after

    def _without_held(self, result: Tokenized) -> Tokenized:
        """A block's documents less those of the training part whose text is held out."""
        part = result.parts["train"]
        kept = np.array([row.tobytes() not in self._held for row in part.documents["digest"]], bool)
        dropped = part.documents["bytes"][~kept]
        if not len(dropped):
            return result
        self.counts = replace(
            self.counts,
            in_both=self.counts.in_both + (len(dropped) if self._between_documents else 0),
            in_both_bytes=self.counts.in_both_bytes + int(dropped.sum()),
        )
        return replace(result, parts={**result.parts, "train": _select(part, kept, self._dtype)})

    def _without_duplicates(self, result: Tokenized, fragment: Fragment | None, seen: set[bytes]) -> Tokenized:
        """A block's documents less those that came before; of a long one, all fragments or none."""
        if fragment is not None:
            digest = bytes.fromhex(fragment.digest)
            self._dropping = digest in seen if fragment.opens else self._dropping
            if not self._dropping:
                seen.add(digest)
                return result
        parts, kept_val = {}, np.empty(0, bool)
        for split, part in result.parts.items():
            digests = [row.tobytes() for row in part.documents["digest"]]
            kept_val = np.array([fragment is None and not (d in seen or seen.add(d)) for d in digests], bool)
            parts[split] = _select(part, kept_val, self._dtype)
            dropped = part.documents["bytes"][~kept_val]
            closed = len(dropped) if fragment is None else len(dropped) * fragment.closes
            self.counts = replace(
                self.counts,
                duplicates=self.counts.duplicates + closed,
                duplicate_bytes=self.counts.duplicate_bytes + int(dropped.sum()),
            )
        sizes = result.parts["val"].documents["bytes"]
        text = _take(result.val_text, np.cumsum(sizes), kept_val)
        return replace(result, parts=parts, val_text=text)

    def commit(self) -> None:
        """Makes everything so far survive a crash; does nothing in the middle of a document."""
        if not self._between_documents:
            return
        state = {
            "position": asdict(self.position),
            "counts": asdict(self.counts),
            "splits": {split: writer.commit() for split, writer in self._splits.items()},
        }
        for appender in (self._sources, self._val_text):
            appender.sync()
        if self._hold_out is not None:
            state["hold_out"] = self._hold_out
        state |= {"sources_size": self._sources.size, "val_text_size": self._val_text.size}
        write_atomically(self._folder / JOURNAL, json_text(state))

    def close(self) -> None:
        """Closes the files without finishing."""
        for writer in self._splits.values():
            writer.close()
        self._sources.close()
        self._val_text.close()

    def finish(self, on_gzip: Callable[[int, int], None]) -> dict[str, Any]:
        """Closes the store's files; the index's entries about them.

        Args:
            on_gzip: called with the bytes compressed so far, and in all.
        """
        self.commit()
        self._sources.close()
        self._val_text.close()
        splits = {split: writer.finish() for split, writer in self._splits.items()}
        splits["val"]["gzip_bytes"] = gzip_size(self._val_text.path, on_gzip)
        splits["val"]["gzip_of"] = self._val_text.size
        return {
            "splits": splits,
            "sources": {"file": SOURCES, "sha256": self._sources.sha256},
            "counts": self.counts.entries(),
        }

    def remove_work_files(self) -> None:
        """To be called once the index is written."""
        for name in (JOURNAL, "val.text", *(f"{split}.documents" for split in SPLITS)):
            (self._folder / name).unlink(missing_ok=True)


def _counts(state: dict[str, Any]) -> Counts:
    return Counts(**{**state, "first_bad": tuple(state["first_bad"])})


def _select(part: SplitPart, kept: np.ndarray, dtype: np.dtype) -> SplitPart:
    """The documents of a part that are kept."""
    ends = part.documents["end"]
    rows = part.documents[kept].copy()
    rows["end"] = np.cumsum(np.diff(ends, prepend=0)[kept])
    return SplitPart(tokens=_take(part.tokens, ends * dtype.itemsize, kept), documents=rows)


def _take(data: bytes, ends: np.ndarray, kept: np.ndarray) -> bytes:
    """Of consecutive pieces that end at `ends`, those that are kept."""
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    return b"".join(data[int(start) : int(end)] for start, end in zip(starts[kept], ends[kept], strict=True))


def gzip_size(path: Path, on_progress: Callable[[int, int], None]) -> int:
    """The size that ``gzip -9`` makes of a file, in constant memory (without the file name that gzip records)."""
    total = path.stat().st_size
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31, 9)
    size = done = 0
    for data in chunks(path):
        size += len(compressor.compress(data))
        done += len(data)
        on_progress(done, total)
    return size + len(compressor.flush())
