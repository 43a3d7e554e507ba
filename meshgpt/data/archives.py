"""Archives: the members of a .zip or .tar as files to read, each by its own ending. No member's name touches the disk.

A tar has no list of its members: it is gone through once for their names and once for their text, in its own order.
"""

import shutil
import tarfile
import tempfile
import weakref
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any, Protocol

from meshgpt.data.failures import BadInputError, explain
from meshgpt.data.streams import open_file
from meshgpt.data.text_files import SourceFile
from meshgpt.data.unread import Unread, shown

_HELD_BYTES = 1 << 20  # larger members of a tar are kept aside while they are read, since long texts are read twice


class _Archive(Protocol):
    def open(self, number: int) -> IO[bytes]:
        """A member's bytes."""
        ...


@dataclass(frozen=True, kw_only=True)
class Member(SourceFile):
    """A file in an archive: the `number`-th entry."""

    archive: _Archive = field(repr=False)
    number: int

    @property
    def location(self) -> str:
        return f"{self.path}#{self.number}"

    def open(self) -> IO[bytes]:
        return self.archive.open(self.number)


def members(file: SourceFile, unread: Unread) -> tuple[list[Member], BadInputError | None]:
    """The files in an archive, in its order, and what is wrong with the archive where it breaks off.

    Args:
        unread: told of what is neither a file nor a folder.
    """
    archive = _Zip(file) if file.kind == "zip" else _Tar(file)
    found: list[Member] = []
    try:
        for number, name, size, why in archive.entries():
            full = shown(f"{file.name}/{name}")
            if why:
                unread.add(why, full)
            else:
                found.append(
                    Member(
                        path=file.location, name=full, size=size, version=file.version, archive=archive, number=number
                    )
                )
    except Exception as error:
        problem = explain(error, file.name)
        if not isinstance(problem, BadInputError):
            raise problem from error
        return found, problem
    return found, None


def hidden(name: str) -> bool:
    """Whether a member is hidden, or of the folder that macOS adds."""
    parts = [part for part in PurePosixPath(name).parts if part not in (".", "..")]
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


# Number, name and size of an entry, and why it cannot be read, if so.
_Entry = tuple[int, str, int, str]


class _Zip:
    def __init__(self, file: SourceFile):
        self._file = file
        self._stack = ExitStack()
        self._zip: zipfile.ZipFile | None = None
        weakref.finalize(self, self._stack.close)

    def entries(self) -> Iterator[_Entry]:
        for number, info in enumerate(self._opened().infolist()):
            if not info.is_dir():
                yield number, info.filename, info.file_size, "encrypted" if info.flag_bits & 1 else ""

    def open(self, number: int) -> IO[bytes]:
        archive = self._opened()
        return archive.open(archive.infolist()[number])

    def _opened(self) -> zipfile.ZipFile:
        if self._zip is None:
            handle: Any = self._stack.enter_context(self._file.open())
            self._zip = self._stack.enter_context(zipfile.ZipFile(handle))
        return self._zip


class _Strict(tarfile.TarInfo):
    """Does not take a broken header for the end of the archive, as `tarfile` does."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Any:
        try:
            return super().fromtarfile(tarfile)
        except (_InvalidHeader, _TruncatedHeader) as error:
            raise _ReadError(f"a broken header: {error}") from error


_InvalidHeader: Any = getattr(tarfile, "InvalidHeaderError")  # noqa: B009 (the stubs do not have it)
_TruncatedHeader: Any = getattr(tarfile, "TruncatedHeaderError")  # noqa: B009
_ReadError = tarfile.ReadError


class _Tar:
    def __init__(self, file: SourceFile):
        self._file = file
        self._stack = ExitStack()  # of what is open
        self._tar: tarfile.TarFile | None = None
        self._next = 0  # the entry that is read next
        self._held: tuple[int, IO[bytes]] | None = None  # a large member and its number
        weakref.finalize(self, _close, self._stack)

    def entries(self) -> Iterator[_Entry]:
        self._open()
        number = -1
        while (info := self._advance()) is not None:
            number += 1
            if info.isreg():
                yield number, info.name, info.size, ""
            elif not info.isdir():
                yield number, info.name, 0, "a link" if info.islnk() or info.issym() else "neither file nor folder"
        self._stack.close()
        self._tar = None

    def open(self, number: int) -> IO[bytes]:
        if self._held is not None and self._held[0] == number:
            self._held[1].seek(0)
            return _kept(self._held[1])
        if self._tar is None or number < self._next:
            self._open()
        info = None
        while self._next <= number:
            info = self._advance()
            if info is None:
                raise EOFError("a member is gone")
        assert self._tar is not None
        assert info is not None
        stream = self._tar.extractfile(info)
        assert stream is not None
        if info.size <= _HELD_BYTES:
            return stream
        with stream:
            spool = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            shutil.copyfileobj(stream, spool)
        self._held = number, spool
        spool.seek(0)
        return _kept(spool)

    def _open(self) -> None:
        self._stack.close()
        self._held, self._next = None, 0
        stream, _ = self._stack.enter_context(open_file(self._file))
        self._tar = self._stack.enter_context(tarfile.open(fileobj=stream, mode="r|", tarinfo=_Strict))  # noqa: SIM115

    def _advance(self) -> tarfile.TarInfo | None:
        assert self._tar is not None
        if self._held is not None:
            self._held[1].close()
            self._held = None
        info = self._tar.next()
        self._tar.members = []  # pyright: ignore[reportAttributeAccessIssue] (it keeps all, of which we need none)
        self._next += 1
        return info


def _close(stack: ExitStack) -> None:
    stack.close()


def _kept(file: IO[bytes]) -> Any:
    return _Kept(file)


class _Kept:
    """A file that closing leaves open."""

    def __init__(self, file: IO[bytes]):
        self._file = file

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def __enter__(self) -> "_Kept":
        return self

    def __exit__(self, *_: object) -> None:
        pass
