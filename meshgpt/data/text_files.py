"""Files of text and of JSON, on a disk or anywhere fsspec reaches, each plain or compressed."""

import glob
import os
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, final

from meshgpt.data import formats
from meshgpt.data.blocks import (
    BLOCK_BYTES,
    Origin,
    json_blocks,
    json_value_blocks,
    parts_of,
    record_blocks,
    text_blocks,
    without_bom,
)
from meshgpt.data.documents import SPLIT_PREFIX, Block
from meshgpt.data.encodings import as_utf8
from meshgpt.data.failures import BadInputError
from meshgpt.data.json_values import json_values, one_a_line
from meshgpt.data.pieces import Piece, pieces
from meshgpt.data.streams import FileDigest, HashingReader, digest_of, open_file, open_path
from meshgpt.data.unread import Unread, shown, told
from meshgpt.data.walk import OTHER_ENDING, is_store, special, walk
from meshgpt.errors import MachineError, UserError, explained

STDLIB = "stdlib"  # the source that every machine has: the running Python's own library
_STDLIB_SKIP = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_OLD_COMPRESSED = (".gz", ".zst", ".xz")


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file to read.

    Attributes:
        path: where it is, a path or a URL.
        name: what the store calls it.
        size: bytes as stored.
        version: another one when it has changed.
        new: whether it is of a folder, and stores once did not read it.
        standard_input: whether it holds what came from there.
    """

    path: str
    name: str
    size: int
    version: str
    new: bool = False
    standard_input: bool = False

    @property
    def kind(self) -> formats.Kind:
        """What is inside."""
        return formats.kind_of(self.name)

    @property
    def location(self) -> str:
        """Equal for two names of one file."""
        return self.path if "://" in self.path else os.path.realpath(self.path)

    def open(self) -> IO[bytes]:
        """Its bytes, as they are stored."""
        return open_path(self.path)


@final
class Text:
    """A text file, which is one document, or a file of JSON, of which every record is one; a `sources.Input`."""

    def __init__(self, file: SourceFile):
        self._file = file
        self.name, self.size, self.version, self.location = file.name, file.size, file.version, file.location
        self.earlier = None if file.new else file.version
        self.small = file.kind == "text" and not formats.compression(file.name) and not file.standard_input

    @property
    def one_document(self) -> bool:
        """Whether it is known to be one, before it is read."""
        return self._file.kind == "text" and not self._file.standard_input

    def head(self) -> bytes:
        """What decides its split, if it is one document; nothing where it cannot be read."""
        try:
            with open_file(self._file) as (stream, _):
                return without_bom(stream.read(SPLIT_PREFIX + 3))[:SPLIT_PREFIX]
        except (UserError, MachineError):
            return b""

    def read(self, origin: Origin) -> Iterator[Piece]:
        opened: list[HashingReader] = []
        digests: list[FileDigest] = []

        @contextmanager
        def open_text() -> Iterator[IO[bytes]]:
            with open_file(self._file) as (stream, raw):
                opened.append(raw)
                yield as_utf8(stream, origin.encoding)
                digests.append(raw.finish())

        def finish() -> FileDigest:
            if len({digest.sha256 for digest in digests}) > 1:
                raise UserError(f"{self.name} changed while it was read: run again when nothing writes to it")
            return digests[-1] if digests else digest_of(self._file)

        return pieces(self._blocks(open_text, origin), origin, lambda _: opened[-1].size, finish)

    def _blocks(self, open_text: Any, origin: Origin) -> Iterator[Block]:
        kind = self._file.kind
        if kind == "text" and origin.split_at:
            with open_text() as stream:
                yield from record_blocks(parts_of(stream, origin.split_at.encode()), origin)
            return
        if kind == "text" and not self._file.standard_input:
            yield from text_blocks(open_text, origin)
            return
        with open_text() as stream:
            begun = _Begun(stream)
            problem = formats.binary(begun.head, self.name)
            if problem:
                raise BadInputError(problem)
            if kind == "json_lines" or one_a_line(begun.head):
                yield from json_blocks(begun, origin)  # pyright: ignore[reportArgumentType]
                return
            if kind == "json":
                yield from json_value_blocks(json_values(begun, self.name), origin)  # pyright: ignore[reportArgumentType]
                return
        yield from text_blocks(open_text, origin)


class _Begun:
    """A stream whose beginning was looked at: `head`."""

    def __init__(self, stream: IO[bytes]):
        self._stream = stream
        self.head = self._left = stream.read(BLOCK_BYTES).removeprefix(b"\xef\xbb\xbf")

    def read(self, size: int) -> bytes:
        data, self._left = self._left[:size], self._left[size:]
        return data + self._stream.read(size - len(data)) if len(data) < size else data


def list_files(source: str, extensions: Sequence[str], unread: Unread | None = None, out: str = "") -> list[SourceFile]:
    """The files of one source: a file, a folder (searched through, by `extensions`), a glob or `STDLIB`; sorted.

    Args:
        unread: told of what is there and is not read.
        out: the folder of the store, which is not read.

    Raises:
        UserError: there is none, or a place that cannot be listed.
    """
    unread = Unread() if unread is None else unread
    out = os.path.realpath(out) if out else ""
    if "://" in source:
        return _list_remote(source, extensions, unread)
    if source == STDLIB:
        root = sysconfig.get_path("stdlib")
        found = walk(root, lambda name: formats.has_ending(name, (".py",)), Unread(), _STDLIB_SKIP)
        return [_local(path, f"{STDLIB}/{name}") for path, name in sorted(found, key=lambda pair: pair[1])]
    if os.path.isdir(source):
        return _list_folder(source, extensions, unread, out)
    if os.path.isfile(source):
        return [_local(source, source)]
    return _list_glob(source, unread, out)


def _list_folder(source: str, extensions: Sequence[str], unread: Unread, out: str) -> list[SourceFile]:
    if os.path.realpath(source) == out or is_store(source):
        raise UserError(f"source {source!r} is the folder of a token store: name the folder of its text")
    found = sorted(
        walk(source, lambda name: formats.has_ending(name, extensions), unread, out=out), key=lambda pair: pair[1]
    )
    if not found:
        _nothing_in("folder", source, extensions, unread)
    return [_local(path, os.path.join(source, name), extensions) for path, name in found]


def _list_glob(source: str, unread: Unread, out: str) -> list[SourceFile]:
    try:
        matches = sorted(glob.glob(source, recursive=True))
    except RecursionError as error:
        raise UserError(f"source {source!r}: folders too deep for a pattern: name the folder itself") from error
    files = []
    for path in matches:
        odd = special(path)
        if odd:
            unread.add(odd, path)
        elif os.path.isdir(path):
            unread.add("a folder that a pattern matches: end the pattern with /**/* for what is in it", path)
        elif out and os.path.realpath(path).startswith(out + os.sep):
            unread.add("a part of the store", path)
        else:
            files.append(path)
    if not files and matches:
        raise UserError(f"source {shown(source)!r} is {special(matches[0]) or 'folders alone'}: {_remedy(matches[0])}")
    if not files:
        raise UserError(
            f"source {shown(source)!r} does not exist: "
            f"name a file, a folder, a glob, a URL, tfds:..., hf:..., {STDLIB!r}, or - for standard input"
        )
    return [_local(path, path) for path in files]


def _remedy(path: str) -> str:
    if special(path).startswith("a pipe"):
        return f"pass its text on standard input (cat {shown(path)} | meshgpt prepare - ...)"
    return "name what is to be read"


def _nothing_in(what: str, source: str, extensions: Sequence[str], unread: Unread) -> None:
    found = "; ".join(told(unread.record()))
    raise UserError(
        f"{what} {source!r} holds no file ending in {', '.join(extensions)} "
        f"(or these with {', '.join(formats.COMPRESSED)}): name its files' endings with --extensions"
        + (f". What it holds: {found}" if found else "")
    )


def _local(path: str, name: str, extensions: Sequence[str] = ()) -> SourceFile:
    status = os.stat(path)
    version = str(status.st_mtime_ns) + formats.reading_since(name)
    return SourceFile(
        path=path, name=shown(name), size=status.st_size, version=version, new=_new(name, version, extensions)
    )


def _new(name: str, version: str, extensions: Sequence[str]) -> bool:
    """Whether a file of a folder was not read by what once listed folders."""
    if not extensions:
        return False
    plain = next((name.removesuffix(one) for one in _OLD_COMPRESSED if name.endswith(one)), name)
    return not plain.endswith(tuple(one for one in extensions if one not in formats.NEW_IN_FOLDERS))


def _list_remote(source: str, extensions: Sequence[str], unread: Unread) -> list[SourceFile]:
    """The same for a URL, such as ``gs://bucket/folder`` or ``https://host/file.jsonl.gz``."""
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(source)
        if any(letter in path for letter in "*?["):
            paths = sorted(filesystem.glob(path))
        elif filesystem.isdir(path):
            paths = []
            for one in sorted(filesystem.find(path)):
                if formats.has_ending(one, extensions):
                    paths.append(one)
                else:
                    unread.add(OTHER_ENDING, filesystem.unstrip_protocol(one))
            if not paths:
                _nothing_in("folder", source, extensions, unread)
        else:
            paths = [path]
        return [_remote(filesystem, one) for one in paths if not filesystem.isdir(one)] or _no_source(source)
    except FileNotFoundError:
        return _no_source(source)
    except ImportError as error:  # fsspec names the package that knows this kind of URL
        raise UserError(f"source {source!r}: {error}") from error
    except ValueError as error:
        raise UserError(f"source {source!r} cannot be listed: {error}") from error
    except OSError as error:
        raise explained(error, f"source {source!r} cannot be listed: {error}") from error


def _no_source(source: str) -> list[SourceFile]:
    raise UserError(f"source {source!r} does not exist: check the spelling, and that this machine may read it")


def _remote(filesystem: Any, path: str) -> SourceFile:
    url = filesystem.unstrip_protocol(path)
    about = filesystem.info(path)
    if about.get("size") is None:
        raise UserError(f"{url} does not say how large it is: fetch it first")
    version = next((str(about[key]) for key in ("ETag", "etag", "mtime", "updated", "created") if about.get(key)), "")
    version += formats.reading_since(url)
    return SourceFile(path=url, name=url, size=int(about["size"]), version=version)
