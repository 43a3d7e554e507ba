"""A file's bytes, decompressed and hashed on the way: plain, .gz, .bz2, .xz or .zst, wherever they come from."""

import bz2
import gzip
import hashlib
import io
import lzma
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import IO, BinaryIO, Protocol

from meshgpt.data import formats
from meshgpt.data.failures import BadInputError, explain
from meshgpt.errors import UserError

_READ_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """What was read of a source: its size and the sha256 of its bytes (of its texts, where it has no bytes)."""

    name: str
    size: int
    sha256: str


class File(Protocol):
    """What can be opened and read from its beginning.

    Attributes:
        name: for messages; its endings name the compression and the kind.
        size: bytes as stored.
    """

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    def open(self) -> IO[bytes]:
        """Its bytes, as they are stored."""
        ...


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
def open_file(file: File) -> Iterator[tuple[BinaryIO, HashingReader]]:
    """A file's text and, under it, its bytes.

    Raises:
        UserError: it cannot be read, or its compressed stream is damaged; names it.
        MachineError: the disk or the network fails.
    """
    try:
        with file.open() as handle:
            raw = HashingReader(file.name, file.size, handle)
            yield _decompress(file.name, raw), raw
    except Exception as error:
        raise explain(error, file.name) from error


@dataclass(frozen=True, kw_only=True)
class _Named:
    path: str
    name: str
    size: int

    def open(self) -> IO[bytes]:
        return open_path(self.path)


def open_stream(path: str, name: str, size: int) -> AbstractContextManager[tuple[BinaryIO, HashingReader]]:
    """`open_file` of a path or URL, whose compression the ending of `name` says."""
    return open_file(_Named(path=path, name=name, size=size))


def open_path(path: str) -> IO[bytes]:
    """A file on a disk or, by its URL, anywhere fsspec reaches."""
    if "://" not in path:
        return open(path, "rb", buffering=0)
    import fsspec

    return fsspec.open(path, "rb").open()  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]


def digest_of(file: File) -> FileDigest:
    """Reads a whole file, as it is stored; without a sha256 where it cannot be, as a damaged member of an archive."""
    try:
        with file.open() as handle:
            return HashingReader(file.name, file.size, handle).finish()
    except Exception as error:
        problem = explain(error, file.name)
        if not isinstance(problem, BadInputError):
            raise problem from error
        return FileDigest(name=file.name, size=file.size, sha256="")


def _decompress(name: str, raw: HashingReader) -> BinaryIO:
    compression = formats.compression(name)
    if compression == ".gz":
        return gzip.GzipFile(fileobj=raw)  # pyright: ignore[reportReturnType, reportArgumentType]
    if compression == ".bz2":
        return _Bz2File(raw)  # pyright: ignore[reportReturnType, reportArgumentType]
    if compression == ".xz":
        return lzma.LZMAFile(raw)  # pyright: ignore[reportReturnType, reportArgumentType]
    if compression == ".zst":
        return _ZstdReader(raw)  # pyright: ignore[reportReturnType]
    return io.BufferedReader(raw, _READ_BYTES)  # pyright: ignore[reportReturnType]


class _Bz2File(bz2.BZ2File):
    """Says of a damaged stream that it is one: bz2's own OSError looks like one of the network."""

    def read(self, size: int | None = -1) -> bytes:
        try:
            return super().read(-1 if size is None else size)
        except OSError as error:
            if str(error) == "Invalid data stream":
                raise EOFError(str(error)) from error
            raise


class _ZstdReader:
    """`read(n)` over concatenated zstd frames; unlike zstandard's own reader it notices one that is cut short."""

    def __init__(self, raw: HashingReader):
        import zstandard

        self._raw = raw
        self._error = zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._decoder = None
        self._ready = bytearray()

    def read(self, size: int = -1) -> bytes:
        while size < 0 or len(self._ready) < size:
            data = self._raw.read(1 << 13)  # small, since a few bytes can decompress to very many
            if not data:
                if self._decoder is not None:
                    raise EOFError("the last frame is incomplete")
                break
            self._feed(data)
        result = bytes(self._ready if size < 0 else self._ready[:size])
        del self._ready[: len(result)]
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
            raise EOFError(str(error)) from error
