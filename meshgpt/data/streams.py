"""A file's bytes, decompressed and hashed on the way: plain, .gz, .zst or .xz, on a disk or anywhere fsspec reaches."""

import gzip
import hashlib
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, BinaryIO

from meshgpt.errors import UserError, explained

COMPRESSED = (".gz", ".zst", ".xz")
_READ_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """What was read of a source: its size and the sha256 of its bytes (of its texts, where it has no bytes)."""

    name: str
    size: int
    sha256: str


def without_compression(name: str) -> str:
    """`name` less the suffix of its compression."""
    return next((name.removesuffix(suffix) for suffix in COMPRESSED if name.endswith(suffix)), name)


class HashingReader(io.RawIOBase):
    """Bytes as they are stored, hashed as they are read."""

    def __init__(self, name: str, size: int, handle: IO[bytes]):
        self._name, self._expected = name, size
        self._handle = handle
        self._hash = hashlib.sha256()
        self.size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._handle.read(len(buffer))
        buffer[: len(data)] = data
        self._hash.update(data)
        self.size += len(data)
        return len(data)

    def finish(self) -> FileDigest:
        """Reads what is left (there may be bytes behind a compressed stream); the digest of all.

        Raises:
            UserError: the file has another size than it had when it was listed.
        """
        while self.read(_READ_BYTES):
            pass
        if self.size != self._expected:
            raise UserError(
                f"{self._name} changed while it was read ({self._expected} bytes, then {self.size}): "
                "run again when nothing writes to it"
            )
        return FileDigest(name=self._name, size=self.size, sha256=self._hash.hexdigest())


@contextmanager
def open_stream(path: str, name: str, size: int) -> Iterator[tuple[BinaryIO, HashingReader]]:
    """A file's text and, under it, its bytes.

    Args:
        path: on a disk, or a URL that fsspec knows.
        name: for messages; its suffix names the compression.
        size: that it should have.

    Raises:
        UserError: it cannot be read, or its compressed stream is damaged; names it.
        MachineError: the disk or the network fails.
    """
    try:
        with _open(path) as handle:
            raw = HashingReader(name, size, handle)
            yield _decompress(name, raw), raw
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, _ZstdError) as error:
        raise UserError(f"{name} is damaged or cut short ({error}): fetch it again") from error
    except OSError as error:
        raise explained(error, f"cannot read {path}: {error.strerror or error}") from error


def _open(path: str) -> IO[bytes]:
    if "://" not in path:
        return open(path, "rb", buffering=0)
    import fsspec

    return fsspec.open(path, "rb").open()  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]


def _decompress(name: str, raw: HashingReader) -> BinaryIO:
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # pyright: ignore[reportReturnType, reportArgumentType]
    if name.endswith(".xz"):
        return lzma.LZMAFile(raw)  # pyright: ignore[reportReturnType, reportArgumentType]
    if name.endswith(".zst"):
        return _ZstdReader(raw)  # pyright: ignore[reportReturnType]
    return io.BufferedReader(raw, _READ_BYTES)  # pyright: ignore[reportReturnType]


class _ZstdError(Exception):
    """A zstd stream that does not decode."""


class _ZstdReader:
    """`read(n)` over concatenated zstd frames; unlike zstandard's own reader it notices one that is cut short."""

    def __init__(self, raw: HashingReader):
        import zstandard

        self._raw = raw
        self._error = zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._decoder = None
        self._ready = bytearray()

    def read(self, size: int) -> bytes:
        while len(self._ready) < size:
            data = self._raw.read(1 << 13)  # small, since a few bytes can decompress to very many
            if not data:
                if self._decoder is not None:
                    raise _ZstdError("the last frame is incomplete")
                break
            self._feed(data)
        result = bytes(self._ready[:size])
        del self._ready[:size]
        return result

    def _feed(self, data: bytes) -> None:
        try:
            while data:
                self._decoder = self._decoder or self._new()
                self._ready += self._decoder.decompress(data)
                if not self._decoder.eof:
                    return
                data = self._decoder.unused_data
                self._decoder = None
        except self._error as error:
            raise _ZstdError(str(error)) from error
