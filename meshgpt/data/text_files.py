"""Files of text and of JSON lines, on a disk or anywhere fsspec reaches, each plain or compressed."""

import glob
import os
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, final

from meshgpt.data.blocks import Origin, json_blocks, text_blocks
from meshgpt.data.documents import Block
from meshgpt.data.streams import COMPRESSED, FileDigest, HashingReader, open_stream, without_compression
from meshgpt.errors import UserError, explained

STDLIB = "stdlib"  # the source that every machine has: the running Python's own library
_STDLIB_SKIP = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file to read.

    Attributes:
        path: where it is, a path or a URL.
        name: what the store calls it.
        size: bytes as stored.
        version: another one when it has changed.
    """

    path: str
    name: str
    size: int
    version: str

    @property
    def kind(self) -> str:
        """The suffix without the compression's, such as ``.jsonl``."""
        return Path(without_compression(self.name)).suffix

    @property
    def location(self) -> str:
        """Equal for two names of one file."""
        return self.path if "://" in self.path else os.path.realpath(self.path)


@final
class Text:
    """A text file, which is one document, or a ``.jsonl`` file, of which every line is one; a `sources.Input`."""

    def __init__(self, file: SourceFile):
        self._file = file
        self.name, self.size, self.version, self.location = file.name, file.size, file.version, file.location
        self.small = file.kind != ".jsonl" and not file.name.endswith(COMPRESSED)

    def read(self, origin: Origin) -> Iterator[tuple[Block, FileDigest | None, int]]:
        opened: list[HashingReader] = []

        @contextmanager
        def open_text() -> Iterator[IO[bytes]]:
            with open_stream(self._file.path, self.name, self.size) as (stream, raw):
                opened.append(raw)
                yield stream
                digests.append(raw.finish())

        digests: list[FileDigest] = []
        held: Block | None = None
        for block in self._blocks(open_text, origin):
            if held is not None:
                yield held, None, opened[-1].size
            held = block
        assert held is not None
        if len({digest.sha256 for digest in digests}) != 1:
            raise UserError(f"{self.name} changed while it was read: run again when nothing writes to it")
        yield held, digests[-1], self.size

    def _blocks(self, open_text: Any, origin: Origin) -> Iterator[Block]:
        if self._file.kind != ".jsonl":
            yield from text_blocks(open_text, origin)
            return
        with open_text() as stream:
            yield from json_blocks(stream, origin)


def list_files(source: str, extensions: Sequence[str]) -> list[SourceFile]:
    """The files of one source: a file, a folder (searched through, by `extensions`), a glob or `STDLIB`; sorted.

    Raises:
        UserError: there is none, or a place that cannot be listed.
    """
    if "://" in source:
        return _list_remote(source, extensions)
    if source == STDLIB:
        root = sysconfig.get_path("stdlib")
        return [_local(path, f"{STDLIB}/{name}") for path, name in _walk(root, (".py",), _STDLIB_SKIP)]
    if os.path.isdir(source):
        found = [_local(path, os.path.join(source, name)) for path, name in _walk(source, extensions, frozenset())]
        return found or _nothing_in(source, extensions)
    if os.path.isfile(source):
        return [_local(source, source)]
    matches = sorted(path for path in glob.glob(source, recursive=True) if os.path.isfile(path))
    if not matches:
        raise UserError(
            f"source {source!r} does not exist: name a file, a folder, a glob, a URL, tfds:..., hf:..., or {STDLIB!r}"
        )
    return [_local(path, path) for path in matches]


def _nothing_in(source: str, extensions: Sequence[str]) -> list[SourceFile]:
    raise UserError(
        f"folder {source!r} holds no file ending in {', '.join(extensions)} (or these with {', '.join(COMPRESSED)}): "
        "name its files' endings with --extensions"
    )


def _local(path: str, name: str) -> SourceFile:
    status = os.stat(path)
    return SourceFile(path=path, name=name, size=status.st_size, version=str(status.st_mtime_ns))


def _walk(root: str, extensions: Sequence[str], skip: frozenset[str]) -> list[tuple[str, str]]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and without_compression(name).endswith(tuple(extensions)):
                path = os.path.join(folder, name)
                found.append((path, os.path.relpath(path, root).replace(os.sep, "/")))
    return sorted(found, key=lambda pair: pair[1])


def _list_remote(source: str, extensions: Sequence[str]) -> list[SourceFile]:
    """The same for a URL, such as ``gs://bucket/folder`` or ``https://host/file.jsonl.gz``."""
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(source)
        if any(letter in path for letter in "*?["):
            paths = sorted(filesystem.glob(path))
        elif filesystem.isdir(path):
            endings = tuple(extensions)
            paths = [one for one in sorted(filesystem.find(path)) if without_compression(one).endswith(endings)]
            if not paths:
                return _nothing_in(source, extensions)
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
    return SourceFile(path=url, name=url, size=int(about["size"]), version=version)
