"""Which files a source names, and their bytes as a fixed sequence of blocks, read in bounded memory.

The sequence depends on the files alone, so that an interrupted run can skip what it has done, and any number of
workers make the same store.
"""

import glob
import gzip
import hashlib
import io
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from meshgpt.data.documents import Block, Fragment, Span, document_digest, split_hash
from meshgpt.errors import UserError

STDLIB = "stdlib"  # the source that every machine has: the running Python's own library
BLOCK_BYTES = 1 << 20
MAX_LINE_BYTES = 256 << 20
_COMPRESSED = (".gz", ".zst")
_STDLIB_SKIP = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_CUT_WINDOW = 1 << 16  # bytes at a block's end in which a place to cut is looked for
_SINGLE_SPACE = re.compile(rb"[!-~](?= [!-~])")


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file to read.

    Attributes:
        path: where it is.
        name: what the store calls it.
        size: bytes on disk.
        mtime_ns: when it last changed, to notice that it did.
        held_out: named as held-out text.
    """

    path: str
    name: str
    size: int
    mtime_ns: int
    held_out: bool

    @property
    def kind(self) -> str:
        """The suffix without the compression's, such as ``.jsonl``."""
        return Path(_without_compression(self.name)).suffix

    @property
    def compressed(self) -> bool:
        return self.name.endswith(_COMPRESSED)


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """What was read of a file: its bytes on disk and their sha256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Position:
    """A place in the sequence of blocks: the next block is number `block` of unit `unit`."""

    unit: int = 0
    block: int = 0


@dataclass(frozen=True, kw_only=True)
class ReadBlock:
    """A block, and what the reader knows once it is done.

    Attributes:
        after: where reading goes on.
        finished: the files that end with this block.
        bytes_read: bytes on disk read up to here, from the beginning of the sources.
    """

    block: Block
    after: Position
    finished: tuple[FileDigest, ...]
    bytes_read: int


def list_files(sources: Sequence[str], extensions: Sequence[str], *, held_out: bool = False) -> list[SourceFile]:
    """The files of `sources`, each a file, a folder (searched through, by `extensions`), a glob or `STDLIB`; sorted.

    Raises:
        UserError: a source that is missing or holds no file of those extensions, or a file named twice.
    """
    files: list[SourceFile] = []
    for source in sources:
        found = _list_source(source, extensions)
        if not found:
            raise UserError(f"source {source!r} names no file to read: check the spelling")
        for path, name in found:
            status = os.stat(path)
            files.append(
                SourceFile(path=path, name=name, size=status.st_size, mtime_ns=status.st_mtime_ns, held_out=held_out)
            )
    return files


def check_unique(files: Sequence[SourceFile]) -> None:
    """Raises UserError for a file that two sources name: it would be read twice."""
    seen: dict[str, str] = {}
    for file in files:
        real = os.path.realpath(file.path)
        if real in seen:
            raise UserError(f"{file.name} is named twice (also as {seen[real]}): remove one of the sources")
        seen[real] = file.name


def units(files: Sequence[SourceFile]) -> list[range]:
    """File numbers in runs that are read together: small text files share a block, any other file stands alone."""
    runs: list[range] = []
    room = -1  # bytes left in the last run's block; negative when no file may join it
    for i, file in enumerate(files):
        small = not file.compressed and file.kind != ".jsonl" and file.size <= BLOCK_BYTES
        if small and file.size <= room:
            runs[-1] = range(runs[-1].start, i + 1)
            room -= file.size
        else:
            runs.append(range(i, i + 1))
            room = BLOCK_BYTES - file.size if small else -1
    return runs


def read_blocks(files: Sequence[SourceFile], start: Position = Position()) -> Iterator[ReadBlock]:
    """The blocks of `files` from `start` on. A unit that was partly done is read again, its done blocks dropped."""
    runs = units(files)
    before = sum(file.size for run in runs[: start.unit] for file in files[run.start : run.stop])
    for number in range(start.unit, len(runs)):
        run = runs[number]
        skip = start.block if number == start.unit else 0
        pieces = _read_group(files, run) if len(run) > 1 else _read_file(files[run.start], run.start)
        for i, (block, finished, consumed) in enumerate(pieces):
            if i >= skip:
                after = Position(unit=number + 1) if finished else Position(unit=number, block=i + 1)
                yield ReadBlock(block=block, after=after, finished=finished, bytes_read=before + consumed)
        before += sum(file.size for file in files[run.start : run.stop])


# A block, the files that end with it, and the unit's bytes on disk read so far.
_Piece = tuple[Block, tuple[FileDigest, ...], int]


def _read_group(files: Sequence[SourceFile], run: range) -> Iterator[_Piece]:
    spans: list[Span] = []
    parts: list[bytes] = []
    digests: list[FileDigest] = []
    for i in run:
        with _open(files[i]) as (stream, raw):
            data = _without_bom(stream.read(BLOCK_BYTES + 1))
            spans.append(Span(file=i, name=files[i].name, record=0, size=len(data), held_out=files[i].held_out))
            parts.append(data)
            digests.append(raw.finish())
    block = Block(kind="text", spans=tuple(spans), payload=b"".join(parts))
    yield block, tuple(digests), sum(digest.size for digest in digests)


def _read_file(file: SourceFile, number: int) -> Iterator[_Piece]:
    """One file's blocks, the last of them with the file's digest; at least one, which may be empty."""
    with _open(file) as (stream, raw):
        blocks = _json_blocks(stream, file, number) if file.kind == ".jsonl" else _text_blocks(stream, file, number)
        held: Block | None = None
        for block in blocks:
            if held is not None:
                yield held, (), raw.size
            held = block
        assert held is not None
        yield held, (raw.finish(),), raw.size


def _json_blocks(stream: BinaryIO, file: SourceFile, number: int) -> Iterator[Block]:
    line = 1
    rest: list[bytes] = []
    waiting = 0
    while True:
        chunk = stream.read(BLOCK_BYTES)
        cut = chunk.rfind(b"\n") + 1 if chunk else 0
        if chunk and not cut:
            rest.append(chunk)
            waiting += len(chunk)
            if waiting > MAX_LINE_BYTES:
                raise UserError(
                    f"{file.name}:{line} is longer than {MAX_LINE_BYTES >> 20} MiB: split that document, or check that "
                    "the file holds one JSON object a line"
                )
            continue
        data = b"".join([*rest, chunk[:cut]])
        span = Span(file=number, name=file.name, record=line, size=len(data), held_out=file.held_out)
        yield Block(kind="json_lines", spans=(span,), payload=data)
        if not chunk:
            return
        line += data.count(b"\n")
        rest = [chunk[cut:]]
        waiting = len(chunk) - cut


def _text_blocks(stream: BinaryIO, file: SourceFile, number: int) -> Iterator[Block]:
    """The whole file as one block where it fits, else as fragments of one document."""

    def block(data: bytes, fragment: Fragment | None) -> Block:
        span = Span(file=number, name=file.name, record=0, size=len(data), held_out=file.held_out)
        return Block(kind="text", spans=(span,), payload=data, fragment=fragment)

    data = _without_bom(stream.read(BLOCK_BYTES + 1))
    if len(data) <= BLOCK_BYTES:
        yield block(data, None)
        return
    digest = document_digest()
    digest.update(data)
    hashed = split_hash(data)
    opens = True
    while True:
        more = stream.read(BLOCK_BYTES)
        if not more:
            yield block(data, Fragment(opens=opens, closes=True, split_hash=hashed, digest=digest.hexdigest()))
            return
        digest.update(more)
        cut = cut_point(data)
        yield block(data[:cut], Fragment(opens=opens, closes=False, split_hash=hashed, digest=None))
        opens = False
        data = data[cut:] + more


def cut_point(data: bytes) -> int:
    """Where to cut a long text so that its parts have the tokens of the whole.

    Before a single space between visible ASCII characters, where GPT-2's pre-tokenizer and sentencepiece both start
    anew; failing that before a line break that follows a visible character; failing that between two characters (then
    the tokens at the seam may differ from those of the whole; the text does not).
    """
    start = max(1, len(data) - _CUT_WINDOW)
    spaces = [match.end() for match in _SINGLE_SPACE.finditer(data, start)]
    if spaces:
        return spaces[-1]
    at = data.rfind(b"\n", start)
    while at > 0:
        if not data[max(0, at - 4) : at].decode("utf-8", errors="ignore")[-1:].isspace():
            return at
        at = data.rfind(b"\n", start, at)
    cut = len(data) - 1
    while cut > start and data[cut] & 0xC0 == 0x80:  # a continuation byte of UTF-8
        cut -= 1
    return cut


class _HashingReader(io.RawIOBase):
    """A file's bytes as they are on disk, hashed on the way."""

    def __init__(self, file: SourceFile, handle: BinaryIO):
        self._file = file
        self._handle = handle
        self._hash = hashlib.sha256()
        self.size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._handle.readinto(buffer)  # pyright: ignore[reportAttributeAccessIssue]
        self._hash.update(memoryview(buffer)[:count])
        self.size += count
        return count

    def finish(self) -> FileDigest:
        while self.read(BLOCK_BYTES):  # bytes behind the compressed stream
            pass
        if self.size != self._file.size:
            raise UserError(
                f"{self._file.name} changed while it was read ({self._file.size} bytes, then {self.size}): "
                "run again when nothing writes to it"
            )
        return FileDigest(name=self._file.name, size=self.size, sha256=self._hash.hexdigest())


@contextmanager
def _open(file: SourceFile) -> Iterator[tuple[BinaryIO, _HashingReader]]:
    try:
        with open(file.path, "rb", buffering=0) as handle:
            raw = _HashingReader(file, handle)  # pyright: ignore[reportArgumentType]
            yield _decompress(file, raw), raw
    except (EOFError, zlib.error, gzip.BadGzipFile, _ZstdError) as error:
        raise UserError(f"{file.name} is damaged or cut short ({error}): fetch it again") from error
    except OSError as error:
        raise UserError(f"cannot read {file.path}: {error.strerror or error}") from error


def _decompress(file: SourceFile, raw: _HashingReader) -> BinaryIO:
    if file.name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # pyright: ignore[reportReturnType, reportArgumentType]
    if file.name.endswith(".zst"):
        return _ZstdReader(raw)  # pyright: ignore[reportReturnType]
    return io.BufferedReader(raw, BLOCK_BYTES)  # pyright: ignore[reportReturnType]


class _ZstdError(Exception):
    """A zstd stream that does not decode."""


class _ZstdReader:
    """`read(n)` over concatenated zstd frames; unlike zstandard's own reader it notices one that is cut short."""

    def __init__(self, raw: _HashingReader):
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


def _list_source(source: str, extensions: Sequence[str]) -> list[tuple[str, str]]:
    """(path, name) of each file of one source."""
    if source == STDLIB:
        root = sysconfig.get_path("stdlib")
        return [(path, f"{STDLIB}/{name}") for path, name in _walk(root, (".py",), _STDLIB_SKIP)]
    if os.path.isdir(source):
        found = [(path, os.path.join(source, name)) for path, name in _walk(source, extensions, frozenset())]
        if not found:
            raise UserError(
                f"folder {source!r} holds no file ending in {', '.join(extensions)} (or these with .gz, .zst): "
                "name its files' endings with --extensions"
            )
        return found
    if os.path.isfile(source):
        return [(source, source)]
    matches = sorted(path for path in glob.glob(source, recursive=True) if os.path.isfile(path))
    if not matches:
        raise UserError(f"source {source!r} does not exist: name a file, a folder, a glob, or {STDLIB!r}")
    return [(path, path) for path in matches]


def _walk(root: str, extensions: Sequence[str], skip: frozenset[str]) -> list[tuple[str, str]]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and _without_compression(name).endswith(tuple(extensions)):
                path = os.path.join(folder, name)
                found.append((path, os.path.relpath(path, root).replace(os.sep, "/")))
    return sorted(found, key=lambda pair: pair[1])


def _without_compression(name: str) -> str:
    return name.removesuffix(".gz").removesuffix(".zst")


def _without_bom(data: bytes) -> bytes:
    return data.removeprefix(b"\xef\xbb\xbf")
