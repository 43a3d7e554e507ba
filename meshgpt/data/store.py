"""A token store: tokens of whole documents end to end, in shards on disk, with an index.

Layout of the folder:
    index.json                      counts, digests, tokenizer; written last, so a folder without it is unfinished
    <split>-00000.bin, ...          little-endian uint16 or uint32, `shard_tokens` in each but the last
    <split>.documents.npy           one row of `DOCUMENT` a document
    sources.jsonl                   one line a source file: name, size, sha256
    tokenizer/                      what `load_tokenizer` and transformers read
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from meshgpt.data.files import file_sha256
from meshgpt.data.tokenizer import Tokenizer, load_tokenizer
from meshgpt.data.worker import DOCUMENT, SPLITS
from meshgpt.errors import UserError

INDEX = "index.json"
_OPEN_FILES = 256  # mapped at a time: each holds a file descriptor, and a corpus has thousands of shards


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of tokens."""

    path: Path
    num_tokens: int
    sha256: str


class Split:
    """The tokens of one split, by position, whatever shard they lie in.

    Attributes:
        folder: the store's.
        name: "train" or "val".
        num_tokens: with the end-of-text tokens.
        num_documents: documents.
        num_bytes: of their text as UTF-8.
        gzip_bytes: what ``gzip -9`` makes of the first
        gzip_of: bytes of the text (val only, else None).
        lossless: whether decoding the tokens gives the text back, as far as `prepare` looked (val only, else True).
    """

    def __init__(
        self, folder: Path, name: str, entry: dict[str, Any], dtype: np.dtype, shard_tokens: int, eot_id: int,
        lossless: bool = True,
    ):  # fmt: skip
        self.folder = folder
        self.name = name
        self.num_tokens: int = entry["num_tokens"]
        self.num_documents: int = entry["num_documents"]
        self.num_bytes: int = entry["num_bytes"]
        self.gzip_bytes: int | None = entry.get("gzip_bytes")
        self.gzip_of: int | None = entry.get("gzip_of")
        self.eot_id = eot_id
        self.lossless = lossless
        self.shards = tuple(
            Shard(path=inside(folder, shard["file"]), num_tokens=shard["num_tokens"], sha256=shard["sha256"])
            for shard in entry["shards"]
        )
        self._documents_path = inside(folder, entry["documents"]["file"])
        self._documents_sha256: str = entry["documents"]["sha256"]
        self._sources_path = folder / "sources.jsonl"
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        for shard in self.shards:
            _check_size(shard.path, shard.num_tokens * dtype.itemsize)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), in the store's dtype, read-only where they lie in one shard.

        Raises:
            IndexError: the range is not within [0, num_tokens].
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of the {self.num_tokens} of split {self.name!r}")
        if start == stop:
            return np.empty(0, self._dtype)
        first, offset = divmod(start, self._shard_tokens)
        last = (stop - 1) // self._shard_tokens
        if first == last:
            return self._map(first)[offset : offset + stop - start]
        pieces = [self._map(first)[offset:], *(self._map(number) for number in range(first + 1, last))]
        return np.concatenate([*pieces, self._map(last)[: stop - last * self._shard_tokens]])

    def _map(self, number: int) -> np.ndarray:
        shard = self.shards[number]
        return _map_file(shard.path, self._dtype, shard.num_tokens)

    @property
    def gzip_bits_per_byte(self) -> float | None:
        """What ``gzip -9`` needs for the text, or for the part of it that was tried."""
        return 8 * self.gzip_bytes / self.gzip_of if self.gzip_bytes and self.gzip_of else None

    @cached_property
    def documents(self) -> np.ndarray:
        """One row of `DOCUMENT` a document, read from disk as it is used."""
        rows = np.load(self._documents_path, mmap_mode="r", allow_pickle=False)
        if rows.dtype != DOCUMENT or rows.shape != (self.num_documents,):
            raise UserError(f"{self._documents_path} does not match the index: prepare the store again")
        return rows

    def bytes_of(self, tokens: int) -> float:
        """Bytes of the text of the first so many tokens; within a document by its share of tokens."""
        if tokens >= self.num_tokens:
            return float(self.num_bytes)
        number = self.document_at(tokens)
        start, stop = self.document_range(number)
        whole = int(self.documents["bytes"][:number].sum(dtype=np.int64))
        return whole + int(self.documents["bytes"][number]) * (tokens - start) / (stop - start)

    def document_at(self, token: int) -> int:
        """The number of the document that holds a token."""
        return int(np.searchsorted(self.documents["end"], token, side="right"))

    def document_name(self, number: int) -> str:
        """Its file, and its line where it had one."""
        row = self.documents[number]
        name = self._source_names[row["file"]]
        return f"{name}:{row['record']}" if row["record"] else name

    def document_range(self, number: int) -> tuple[int, int]:
        """Where a document's tokens lie, with the end-of-text id."""
        return int(self.documents["end"][number - 1]) if number else 0, int(self.documents["end"][number])

    def document_tokens(self, number: int) -> np.ndarray:
        """A document's tokens, with the end-of-text id."""
        return self.tokens(*self.document_range(number))

    def verify(self) -> None:
        """Reads everything and compares digests.

        Raises:
            UserError: names the file that is not what was written.
        """
        for shard in self.shards:
            _check_digest(shard.path, shard.sha256)
        _check_digest(self._documents_path, self._documents_sha256)

    @cached_property
    def _source_names(self) -> list[str]:
        with open(self._sources_path, encoding="utf-8") as lines:
            return [json.loads(line)["name"] for line in lines]


class Store:
    """A finished token store; see the module's docstring.

    Attributes:
        folder: where it is.
        digest: sha256 of the index, and so of everything in the store.
        vocab_size: of its tokenizer.
        eot_id: ends every document.
        fingerprint: of its tokenizer.
    """

    def __init__(self, folder: Path, index: dict[str, Any], digest: str):
        self.folder = folder
        self.index = index
        self.digest = digest
        self.vocab_size: int = index["vocab_size"]
        self.eot_id: int = index["eot_id"]
        self.fingerprint: str = index["tokenizer"]["fingerprint"]
        dtype = np.dtype(index["dtype"]).newbyteorder("<")
        lossless = not index["counts"].get("lossy_held_out", 0)
        self._splits = {
            name: Split(
                folder, name, index["splits"][name], dtype, index["shard_tokens"], self.eot_id,
                lossless=lossless or name != "val",
            )
            for name in SPLITS
        }  # fmt: skip

    @staticmethod
    def open(folder: str | Path) -> "Store":
        """Opens a finished store, checking that every shard has its size.

        Raises:
            UserError: no store there, an unfinished or damaged one.
        """
        folder = Path(folder)
        path = folder / INDEX
        if not path.is_file():
            if (folder / "request.json").is_file():
                raise UserError(f"the token store {folder} is unfinished: run its `meshgpt prepare` again to go on")
            raise UserError(f"no token store at {folder}: make one with `meshgpt prepare SOURCE... --out {folder}`")
        text = path.read_bytes()
        try:
            return Store(folder, json.loads(text), hashlib.sha256(text).hexdigest())
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise UserError(f"{path} is damaged ({error!r}): prepare the store again") from error

    def split(self, name: str) -> Split:
        """The split "train" or "val"."""
        return self._splits[name]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the store.

        Raises:
            UserError: the folder's tokenizer is another one now.
        """
        tokenizer = load_tokenizer(self.folder / "tokenizer")
        self.check_tokenizer(tokenizer, str(self.folder / "tokenizer"))
        return tokenizer

    def check_tokenizer(self, tokenizer: Tokenizer, source: str) -> None:
        """Raises UserError when `tokenizer`, which came from `source`, is not the one that made this store."""
        if tokenizer.fingerprint != self.fingerprint:
            raise UserError(
                f"the tokenizer in {source} ({tokenizer.vocab_size} ids, {tokenizer.fingerprint[:12]}) is not the one "
                f"that made the store {self.folder} ({self.vocab_size} ids, {self.fingerprint[:12]}): "
                "use that one, or prepare the text again"
            )

    def verify(self) -> None:
        """Reads the whole store and compares every digest.

        Raises:
            UserError: names the file that is not what was written.
        """
        for split in self._splits.values():
            split.verify()
        _check_digest(inside(self.folder, self.index["sources"]["file"]), self.index["sources"]["sha256"])
        for name, sha256 in self.index["tokenizer"]["files"].items():
            _check_digest(inside(self.folder / "tokenizer", name), sha256)


def tokenizer_files(folder: Path) -> dict[str, str]:
    """The digests of a tokenizer's files, by name."""
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, where `name`, read from a file, must be a plain file name."""
    if not name or name in (".", "..") or Path(name).name != name:
        raise UserError(f"the index of {folder} names {name!r}, which is no plain file name: do not use this store")
    return folder / name


@lru_cache(maxsize=_OPEN_FILES)
def _map_file(path: Path, dtype: np.dtype, size: int) -> np.ndarray:
    return np.memmap(path, dtype, "r", shape=(size,)).view(np.ndarray)  # a plain view is quicker to slice


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing: copy the whole store again, or prepare it again")
    size = path.stat().st_size
    if size != expected:
        raise UserError(f"{path} has {size} bytes instead of {expected}: copy it again, or prepare the store again")


def _check_digest(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing: copy the whole store again, or prepare it again")
    if file_sha256(path) != sha256:
        raise UserError(f"{path} is damaged (its digest is not the index's): copy it again, or prepare the store again")
