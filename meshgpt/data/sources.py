"""What sources name, and their text as a fixed sequence of blocks, read in bounded memory.

The sequence depends on the sources alone, so that an interrupted run can skip what it has done, and any number of
workers make the same store. A new kind of source is one file with a class that does what `Input` says, and one line in
`list_inputs`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, final

from meshgpt.data import (
    archives,
    blocks,
    formats,
    hf_source,
    parquet,
    saved_source,
    standard_input,
    text_files,
    tfds_source,
    token_files,
)
from meshgpt.data.blocks import Origin
from meshgpt.data.documents import Block
from meshgpt.data.failures import BadInputError
from meshgpt.data.pieces import Piece, pieces
from meshgpt.data.streams import FileDigest, digest_of
from meshgpt.data.text_files import SourceFile
from meshgpt.data.unread import Unread
from meshgpt.data.walk import HIDDEN, OTHER_ENDING
from meshgpt.errors import UserError


class Input(Protocol):
    """One thing that is read from its beginning to its end, such as a file.

    Attributes:
        name: what the store calls it; unique.
        size: how much there is to read, in bytes where it has any, else in records.
        version: another one when its content is another one, as far as can be told without reading it.
        earlier: the same as stores once had it that did not record the reader; None for what was not read then.
        location: equal for two names of one thing.
        small: whether it is plain text that may share a block with its neighbours.
    """

    name: str
    size: int
    version: str
    earlier: str | None
    location: str
    small: bool

    def read(self, origin: Origin) -> Iterator[Piece]:
        """Its blocks, at least one; the last brings the digest.

        Raises:
            UserError: it cannot be read, or changed meanwhile; names it.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Listed:
    """An input and whether the user named it as held-out text."""

    input: Input
    held_out: bool


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How inputs are read: as `blocks.Origin` says."""

    field: str
    on_invalid_utf8: Literal["replace", "error"]
    scratch: Path
    tails: float = 0.0
    encoding: str = "utf-8"
    split_at: str = ""
    token_ids: bool = False
    token_bytes: int = 2
    eot_id: int = -1


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
        finished: the inputs that end with this block.
        size_read: of the inputs' sizes, read up to here.
    """

    block: Block
    after: Position
    finished: tuple[FileDigest, ...]
    size_read: int


def list_inputs(
    sources: Sequence[str],
    extensions: Sequence[str],
    *,
    held_out: bool = False,
    unread: Unread | None = None,
    out: str = "",
    token_ids: bool = False,
) -> list[Listed]:
    """What `sources` name: `tfds:` and `hf:` data sets, else files, folders (by `extensions`), globs, `stdlib`; sorted.

    Args:
        unread: told of what is there and is not read.
        out: the folder of the store, which is not read.
        token_ids: whether a `.bin` file holds token ids.

    Raises:
        UserError: a source that is missing or holds nothing to read.
    """
    unread = Unread() if unread is None else unread
    found: list[Input] = []
    for source in sources:
        if source.startswith(tfds_source.PREFIX):
            found += tfds_source.list_inputs(source)
        elif source.startswith(hf_source.PREFIX):
            found += hf_source.list_inputs(source)
        elif saved_source.is_one(source):
            found.append(saved_source.Saved(source))
        elif source == standard_input.NAME:
            found.append(text_files.Text(standard_input.spooled()))
        else:
            for file in text_files.list_files(source, extensions, unread, out):
                if token_ids and file.name.endswith(".bin") and "://" not in file.path:
                    found.append(token_files.TokenFile(file))
                else:
                    found += _file_inputs(file, extensions, unread)
    return [Listed(input=one, held_out=held_out) for one in found]


def _file_inputs(file: SourceFile, extensions: Sequence[str], unread: Unread) -> list[Input]:
    """A file, or the files in an archive."""
    if file.kind == "parquet":
        return [parquet.Parquet(file)]
    if file.kind not in ("zip", "tar"):
        return [text_files.Text(file)]
    members, problem = archives.members(file, unread)
    found: list[Input] = []
    for member in members:
        name = member.name.removeprefix(file.name + "/")
        if archives.hidden(name):
            unread.add(HIDDEN, member.name)
        elif member.kind in ("zip", "tar"):
            unread.add("an archive within an archive", member.name)
        elif member.kind == "text" and not formats.has_ending(name, extensions):
            unread.add(OTHER_ENDING, member.name)
        else:
            found += _file_inputs(member, extensions, unread)
    if problem is not None:
        found.append(Broken(file, problem))
    if not found:
        raise UserError(
            f"{file.name} holds no file to read: its members must end in {', '.join(extensions)}, .json or .parquet "
            "(name other endings with --extensions)"
        )
    return found


@final
class Broken:
    """What is left of an archive that breaks off: one bad record; an `Input`."""

    small = False

    def __init__(self, file: SourceFile, problem: BadInputError):
        self._file, self._problem = file, problem
        self.name, self.size, self.location = f"{file.name} (the rest of it)", file.size, f"{file.location}#rest"
        self.version = file.version
        self.earlier: str | None = None

    def read(self, origin: Origin) -> Iterator[Piece]:
        block = origin.block("bad", str(self._problem).encode())
        return pieces(iter([block]), origin, lambda _: 0, lambda: replace(digest_of(self._file), name=self.name))


def check_unique(listed: Sequence[Listed]) -> None:
    """Raises UserError for an input that two sources name: it would be read twice."""
    seen: dict[str, str] = {}
    for one in listed:
        location = one.input.location
        if location in seen:
            raise UserError(f"{one.input.name} is named twice (also as {seen[location]}): remove one of the sources")
        seen[location] = one.input.name


def units(listed: Sequence[Listed]) -> list[range]:
    """Numbers of inputs that are read together: small text files share a block, anything else stands alone."""
    runs: list[range] = []
    room = -1  # bytes left in the last run's block; negative when no file may join it
    for i, one in enumerate(listed):
        small = one.input.small and one.input.size <= blocks.BLOCK_BYTES
        if small and one.input.size <= room:
            runs[-1] = range(runs[-1].start, i + 1)
            room -= one.input.size
        else:
            runs.append(range(i, i + 1))
            room = blocks.BLOCK_BYTES - one.input.size if small else -1
    return runs


def read_blocks(listed: Sequence[Listed], reading: Reading, start: Position = Position()) -> Iterator[ReadBlock]:
    """The blocks of all inputs from `start` on. A unit that was partly done is read again, its done blocks dropped."""
    runs = units(listed)
    before = sum(listed[i].input.size for run in runs[: start.unit] for i in run)
    for number in range(start.unit, len(runs)):
        skip = start.block if number == start.unit else 0
        for i, (block, finished, consumed) in enumerate(_read_unit(listed, runs[number], reading)):
            if i >= skip:
                after = Position(unit=number + 1) if finished else Position(unit=number, block=i + 1)
                yield ReadBlock(block=block, after=after, finished=finished, size_read=before + consumed)
        before += sum(listed[i].input.size for i in runs[number])


def _read_unit(
    listed: Sequence[Listed], run: range, reading: Reading
) -> Iterator[tuple[Block, tuple[FileDigest, ...], int]]:
    if len(run) == 1:
        for block, digest, consumed in listed[run.start].input.read(_origin(listed, run.start, reading)):
            yield block, (() if digest is None else (digest,)), consumed
        return
    read = [piece for i in run for piece in listed[i].input.read(_origin(listed, i, reading))]
    joined: list[Block] = []
    for block, _, _ in read:
        if joined and joined[-1].kind == block.kind == "text":
            before = joined.pop()
            block = Block(kind="text", spans=before.spans + block.spans, payload=before.payload + block.payload)
        joined.append(block)
    for block in joined[:-1]:
        yield block, (), 0
    yield joined[-1], tuple(digest for _, digest, _ in read if digest is not None), sum(size for _, _, size in read)


def _origin(listed: Sequence[Listed], number: int, reading: Reading) -> Origin:
    return Origin(
        file=number,
        name=listed[number].input.name,
        held_out=listed[number].held_out,
        field=reading.field,
        on_invalid_utf8=reading.on_invalid_utf8,
        scratch=reading.scratch,
        tails=reading.tails,
        encoding=reading.encoding,
        split_at=reading.split_at,
        token_ids=reading.token_ids,
        token_bytes=reading.token_bytes,
        eot_id=reading.eot_id,
    )
