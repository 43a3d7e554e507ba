"""Texts as blocks: how a stream of text, of JSON lines or of records is cut, in bounded memory, always in the same way.

A document larger than a block becomes fragments. What all of them have to know (in which split it falls, whether it is
a duplicate, whether it can be read at all) takes the whole document, so it is read twice.
"""

import codecs
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Literal, TypeVar

from meshgpt.data import documents, formats
from meshgpt.data.documents import Block, Fragment, Span, document_digest, split_hash
from meshgpt.data.failures import BadInputError, explain
from meshgpt.data.long_line import LongLine
from meshgpt.errors import UserError

_T = TypeVar("_T")
BLOCK_BYTES = 1 << 20
LONG_LINE_BYTES = 16 << 20
_CUT_WINDOW = 1 << 16  # bytes at a block's end in which a place to cut is looked for
_SINGLE_SPACE = re.compile(rb"[!-~](?= [!-~])")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What blocks are made from: the source's number in the order of reading, its name, and how to read it.

    Attributes:
        field: the field or column that holds the text.
        on_invalid_utf8: as in `documents.Rules`.
        scratch: a folder for temporary files.
        tails, token_ids: as in `documents.Rules`.
        encoding: of files of text and JSON; see `encodings`.
        split_at: what separates the documents of a text file; "" where it is one document.
        token_bytes: of an id in files of them.
        eot_id: ends their documents.
    """

    file: int
    name: str
    held_out: bool
    field: str
    on_invalid_utf8: Literal["replace", "error"]
    scratch: Path
    tails: float = 0.0
    encoding: str = "utf-8"
    split_at: str = ""
    token_ids: bool = False
    token_bytes: int = 2
    eot_id: int = -1

    def block(
        self, kind: Literal["text", "json_lines", "json_records", "records", "tokens", "bad"], data: bytes,
        record: int = 0, lengths: tuple[int, ...] = (), fragment: Fragment | None = None,
    ) -> Block:  # fmt: skip
        """A block with one span."""
        span = Span(file=self.file, name=self.name, record=record, size=len(data), held_out=self.held_out)
        return Block(kind=kind, spans=(span,), payload=data, lengths=lengths, fragment=fragment)


def without_bom(data: bytes) -> bytes:
    """`data` less the mark that some programs put before UTF-8."""
    return data.removeprefix(_BOM)


def text_blocks(open_text: Callable[[], AbstractContextManager[IO[bytes]]], origin: Origin) -> Iterator[Block]:
    """A whole file of text as one block where it fits, else as fragments of one document.

    Args:
        open_text: opens the text from its beginning; called again for a long one.
    """
    with open_text() as stream:
        data = without_bom(stream.read(BLOCK_BYTES + 1))
        problem = formats.binary(data, origin.name)
        if problem:
            raise BadInputError(problem)
        if len(data) <= BLOCK_BYTES:
            yield origin.block("text", data)
            return

    def chunks() -> Iterator[bytes]:
        with open_text() as stream:
            yield from _chunks(stream)

    yield from _long_document(chunks, origin, 0)


def json_blocks(stream: IO[bytes], origin: Origin) -> Iterator[Block]:
    """Lines of JSON, whole ones, about a block at a time; a very long one goes through the disk (`long_line`)."""
    line = 1
    rest: list[bytes] = []
    waiting = 0
    behind = b""  # what was read beyond a long line
    while chunk := behind or stream.read(BLOCK_BYTES):
        behind = b""
        cut = chunk.rfind(b"\n") + 1
        if not cut:
            rest.append(chunk)
            waiting += len(chunk)
            if waiting > LONG_LINE_BYTES:
                read_on: list[bytes] = []
                reader = LongLine(f"{origin.name}:{line}", origin.field, origin.on_invalid_utf8, origin.scratch)
                with closing(reader):
                    yield from _long_line(reader, _until_newline(rest, stream, read_on), origin, line)
                line += 1
                behind, rest, waiting = b"".join(read_on), [], 0
            continue
        data = b"".join([*rest, chunk[:cut]])
        yield origin.block("json_lines", data, line)
        line += data.count(b"\n")
        rest, waiting = [chunk[cut:]], len(chunk) - cut
    yield origin.block("json_lines", b"".join(rest), line)


def json_value_blocks(values: Iterator[tuple[bytes, bool]], origin: Origin) -> Iterator[Block]:
    """Records of JSON that are not a line each, about a block at a time; a very long one as in `json_blocks`.

    Args:
        values: pieces of records, each with whether a record ends with it.
    """
    waiting: list[bytes] = []
    begun: list[bytes] = []
    number, size, begun_size = 1, 0, 0  # of the record that is being read, of `waiting`, of `begun`
    broken: list[Exception] = []
    for piece, ends in _as_far_as(values, broken):
        begun.append(piece)
        begun_size += len(piece)
        if begun_size > LONG_LINE_BYTES and not ends:
            if waiting:
                yield _records(waiting, origin, number, "json_records")
                waiting, size = [], 0
            reader = LongLine(f"{origin.name}:{number}", origin.field, origin.on_invalid_utf8, origin.scratch)
            with closing(reader):
                yield from _long_line(reader, _until_end(begun, values), origin, number)
            number, begun, begun_size = number + 1, [], 0
        elif ends:
            record = b"".join(begun)
            if waiting and size + len(record) > BLOCK_BYTES:
                yield _records(waiting, origin, number, "json_records")
                waiting, size = [], 0
            waiting.append(record)
            size += len(record)
            number, begun, begun_size = number + 1, [], 0
    yield _records(waiting, origin, number, "json_records")
    if broken:
        raise broken[0]


def record_blocks(records: Iterable[bytes | UserError], origin: Origin, first: int = 1) -> Iterator[Block]:
    """Records, each one text, or token ids, or what is wrong with it, about a block at a time.

    Args:
        first: the number of the first record.
    """
    kind = "tokens" if origin.token_ids else "records"
    waiting: list[bytes] = []
    size = 0
    number = first - 1
    broken: list[Exception] = []
    for number, record in enumerate(_as_far_as(records, broken), start=first):
        length = BLOCK_BYTES if isinstance(record, UserError) else len(record)  # a bad one stands alone
        if waiting and size + length > BLOCK_BYTES:
            yield _records(waiting, origin, number, kind)
            waiting, size = [], 0
        if isinstance(record, UserError):
            yield origin.block("bad", str(record).encode())
        elif length > BLOCK_BYTES and kind == "records":
            yield from _long_record(record, origin, number)
        else:
            waiting.append(record)
            size += len(record)
    yield _records(waiting, origin, number + 1, kind)
    if broken:
        raise broken[0]


def _as_far_as(items: Iterable[_T], broken: list[Exception]) -> Iterator[_T]:
    """`items` until they break off; what they raised goes to `broken`, for after what was read."""
    try:
        yield from items
    except Exception as error:
        broken.append(error)


def _long_document(
    chunks: Callable[[], Iterator[bytes]], origin: Origin, number: int, replaced: int = 0
) -> Iterator[Block]:
    """A document in fragments, or two of it, its head and its held-out tail. chunks: its bytes, from the beginning."""
    cut = _tail_start(chunks, origin.tails) if origin.tails and not origin.held_out else 0
    parts = [(origin, 0, cut), (replace(origin, held_out=True), cut, None)] if cut else [(origin, 0, None)]
    try:
        wholes = [_survey(_range(chunks(), at, stop), of, 0 if at else replaced) for of, at, stop in parts]
    except UserError as error:
        yield origin.block("bad", str(error).encode())
        return
    for (of, start, stop), whole in zip(parts, wholes, strict=True):
        yield from fragments(_range(chunks(), start, stop), whole, of, number)


def _tail_start(chunks: Callable[[], Iterator[bytes]], share: float) -> int:
    """`documents.tail_start` of a long document, in bytes."""
    wanted = int(sum(map(len, chunks())) * (1 - share))
    window = b"".join(_range(chunks(), max(0, wanted - LONG_LINE_BYTES), wanted))
    at = max(window.rfind(b"\n"), 0) or max(window.rfind(b" "), 0)
    return wanted - len(window) + at + 1 if at else 0


def _range(chunks: Iterator[bytes], start: int, stop: int | None) -> Iterator[bytes]:
    """Bytes [start, stop) of all that come."""
    at = 0
    for chunk in chunks:
        piece = chunk[max(0, start - at) : None if stop is None else max(0, stop - at)]
        at += len(chunk)
        if piece:
            yield piece


def parts_of(stream: IO[bytes], marker: bytes) -> Iterator[bytes]:
    """What lies between the markers of a text, each part whole in memory."""
    data, begun = without_bom(stream.read(BLOCK_BYTES)), 0
    while True:
        at = data.find(marker, begun)
        if at >= 0:
            yield data[:at]
            data, begun = data[at + len(marker) :], 0
            continue
        begun = max(0, len(data) - len(marker) + 1)
        more = stream.read(max(BLOCK_BYTES, len(data)))
        if not more:
            yield data
            return
        data += more


def fragments(chunks: Iterable[bytes], whole: Fragment, origin: Origin, record: int) -> Iterator[Block]:
    """One long document in parts. chunks: its bytes, as they come; whole: what `_survey` found."""
    data = b""
    opens = True
    for chunk in chunks:
        while len(data) >= BLOCK_BYTES:
            cut = cut_point(data[:BLOCK_BYTES])
            yield origin.block("text", data[:cut], record, (), _part(whole, opens, False))
            opens = False
            data = data[cut:]
        data += chunk
    yield origin.block("text", data, record, (), _part(whole, opens, True))


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


def _survey(chunks: Iterable[bytes], origin: Origin, replaced: int = 0) -> Fragment:
    """Reads a long document once: what every fragment of it says.

    Raises:
        UserError: it is not UTF-8, where that is refused.
    """
    digest = document_digest()
    check = codecs.getincrementaldecoder("utf-8")(errors="strict")
    head = b""
    try:
        for chunk in chunks:
            digest.update(chunk)
            if len(head) < documents.SPLIT_PREFIX:
                head += chunk
            if origin.on_invalid_utf8 == "error":
                check.decode(chunk)
        if origin.on_invalid_utf8 == "error":
            check.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise documents.not_utf8(origin.name, error) from error
    return Fragment(opens=True, closes=True, split_hash=split_hash(head), digest=digest.hexdigest(), replaced=replaced)


def _part(whole: Fragment, opens: bool, closes: bool) -> Fragment:
    return Fragment(
        opens=opens, closes=closes, split_hash=whole.split_hash, digest=whole.digest, replaced=whole.replaced
    )


def _chunks(stream: IO[bytes]) -> Iterator[bytes]:
    """The bytes of a text file, less its mark."""
    data = without_bom(stream.read(BLOCK_BYTES))
    while data:
        yield data
        data = stream.read(BLOCK_BYTES)


def _until_newline(rest: list[bytes], stream: IO[bytes], left: list[bytes]) -> Iterator[bytes]:
    """The bytes of a line that began with `rest`; what is read beyond it goes to `left`."""
    yield without_bom(b"".join(rest))
    while chunk := stream.read(BLOCK_BYTES):
        at = chunk.find(b"\n")
        if at >= 0:
            yield chunk[:at]
            left.append(chunk[at + 1 :])
            return
        yield chunk


def _until_end(begun: list[bytes], values: Iterator[tuple[bytes, bool]]) -> Iterator[bytes]:
    """The bytes of a record that began with `begun`."""
    yield from begun
    for piece, ends in values:
        yield piece
        if ends:
            return


def _long_line(line: LongLine, chunks: Iterator[bytes], origin: Origin, number: int) -> Iterator[Block]:
    try:
        for chunk in chunks:
            line.feed(chunk)
        text, spool = line.finish()
        data, line.replaced = documents.encoded(text, line.replaced, origin.on_invalid_utf8, f"{origin.name}:{number}")
    except Exception as error:
        problem = explain(error, f"{origin.name}:{number}")
        if not isinstance(problem, UserError):
            raise problem from error
        for _ in chunks:  # to the line's end, where the next one begins
            pass
        yield origin.block("bad", str(problem).encode())
        return
    if spool is None:
        yield origin.block("records", data, number, (len(data),))
        return

    def again() -> Iterator[bytes]:
        spool.seek(0)
        yield from iter(partial(spool.read, BLOCK_BYTES), b"")

    yield from _long_document(again, origin, number, line.replaced)


def _long_record(data: bytes, origin: Origin, number: int) -> Iterator[Block]:
    pieces = [data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES)]
    yield from _long_document(lambda: iter(pieces), origin, number)


def _records(
    waiting: list[bytes], origin: Origin, number: int, kind: Literal["records", "json_records", "tokens"]
) -> Block:
    """`waiting`, which end before record `number`."""
    lengths = tuple(len(record) for record in waiting)
    return origin.block(kind, b"".join(waiting), number - len(waiting), lengths)
