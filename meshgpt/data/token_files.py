"""Files of token ids: nanoGPT's ``train.bin`` and Megatron's ``.bin`` with its ``.idx``; on a disk, uncompressed."""

import hashlib
import itertools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import numpy as np

from meshgpt.data.blocks import Origin, record_blocks
from meshgpt.data.failures import BadInputError
from meshgpt.data.pieces import Piece, pieces
from meshgpt.data.streams import FileDigest
from meshgpt.data.text_files import SourceFile

_MEGATRON = b"MMIDIDX\0\0"
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_READ_TOKENS = 1 << 18
_LONGEST = 1 << 20  # tokens of a document; what has no ends of text is cut into as many


@final
class TokenFile:
    """A ``.bin`` of token ids: documents by its ``.idx`` if there is one, else cut at ends of text; an `Input`."""

    small = False

    def __init__(self, file: SourceFile):
        self._path = Path(file.path)
        self._index = self._path.with_suffix(".idx")
        self.name, self.size, self.location = file.name, file.size, file.location
        self.version = file.version + " as token ids"
        if self._index.is_file():
            self.version += f" {self._index.stat().st_mtime_ns}"
        self.earlier: str | None = None

    def read(self, origin: Origin) -> Iterator[Piece]:
        digest = hashlib.sha256()
        done = [0]
        documents = self._megatron() if self._index.is_file() else self._nanogpt(origin)

        def records() -> Iterator[bytes]:
            for ids in documents:
                done[0] += ids.nbytes
                if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= 1 << 32):
                    raise BadInputError(f"{self.name} holds {ids.min()} to {ids.max()}, which are no token ids")
                data = ids.astype("<u4").tobytes()
                digest.update(len(data).to_bytes(8, "little") + data)
                yield data

        def finish() -> FileDigest:
            return FileDigest(name=self.name, size=self.size, sha256=digest.hexdigest())

        return pieces(record_blocks(records(), origin), origin, lambda _: done[0], finish)

    def _nanogpt(self, origin: Origin) -> Iterator[np.ndarray]:
        dtype = np.dtype(f"<u{origin.token_bytes}")
        if self.size % dtype.itemsize:
            raise BadInputError(f"{self.name} has {self.size} bytes, which are no ids of {dtype.itemsize} bytes each")
        tokens = np.memmap(self._path, dtype, "r") if self.size else np.empty(0, dtype)
        held: list[np.ndarray] = []
        size = 0
        for start in range(0, len(tokens), _READ_TOKENS):
            chunk = np.array(tokens[start : start + _READ_TOKENS])
            ends = np.flatnonzero(chunk == origin.eot_id) + 1
            *whole, rest = np.split(chunk, ends)
            for part in whole:
                yield np.concatenate([*held, part])
                held, size = [], 0
            held, size = [*held, rest], size + len(rest)
            if size >= _LONGEST:
                yield np.concatenate(held)
                held, size = [], 0
        if size:
            yield np.concatenate(held)

    def _megatron(self) -> Iterator[np.ndarray]:
        lengths, starts, dtype = self._megatron_index()
        tokens: Any = np.memmap(self._path, dtype, "r") if self.size else np.empty(0, dtype)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        if ends[-1] != len(tokens):
            raise BadInputError(
                f"{self.name} has {len(tokens):,} ids and {self._index.name} tells of {ends[-1]:,}: fetch both again"
            )
        for first, last in itertools.pairwise(starts):
            yield np.array(tokens[ends[first] : ends[last]])

    def _megatron_index(self) -> tuple[np.ndarray, np.ndarray, np.dtype]:
        """Lengths of the sequences, at which of them documents start and the last one ends, and the ids' dtype."""
        data = self._index.read_bytes()
        where = f"{self.name}: its index {self._index.name}"
        if not data.startswith(_MEGATRON) or len(data) < 34:
            raise BadInputError(f"{where} is none of Megatron's, or cut short: remove it, or fetch it again")
        version, code, count, documents = struct.unpack_from("<QBQQ", data, len(_MEGATRON))
        if version != 1 or code not in _DTYPES:
            raise BadInputError(f"{where} is of version {version} and dtype {code}, which are not known")
        if len(data) < 34 + 12 * count + 8 * documents:
            raise BadInputError(f"{where} is cut short: fetch it again")
        lengths = np.frombuffer(data, "<i4", count, 34).astype(np.int64)
        starts = np.frombuffer(data, "<i8", documents, 34 + 12 * count)
        if len(starts) and (starts[0] < 0 or starts[-1] > count or (np.diff(starts) < 0).any() or (lengths < 0).any()):
            raise BadInputError(f"{where} contradicts itself: fetch it again")
        return lengths, starts, np.dtype(_DTYPES[code])
