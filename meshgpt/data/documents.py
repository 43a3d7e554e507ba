"""A block of source bytes, and the documents in it: decoding, JSON lines, and which documents are held out.

Everything here is a pure function of the bytes, so it may run in any process.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

from meshgpt.data.failures import explain
from meshgpt.data.fields import ids_of, text_of
from meshgpt.errors import UserError

SPLIT_PREFIX = 65_536  # bytes of a document that decide its split, so that a document of any size is decided at once
_T = TypeVar("_T")
_REPLACEMENT = "\ufffd"
_BOM = b"\xef\xbb\xbf"  # before a line where files were joined


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """A part of one document that is larger than a block.

    Attributes:
        opens, closes: whether it is the document's first, its last.
        split_hash: `split_hash` of the document.
        digest: `document_digest` of the whole document, hexadecimal.
        replaced: U+FFFD already put for bytes of it that were not UTF-8.
    """

    opens: bool
    closes: bool
    split_hash: float
    digest: str
    replaced: int = 0


@dataclass(frozen=True, kw_only=True)
class Span:
    """One file's bytes within a block.

    Attributes:
        file: the file's number, in the order of reading.
        name: its name, for messages.
        record: the number of the first line or record, from 1; 0 for a text file, which has none.
        size: bytes of the payload.
        held_out: whether the user named the file as held-out text.
    """

    file: int
    name: str
    record: int
    size: int
    held_out: bool


@dataclass(frozen=True, kw_only=True)
class Block:
    """About a megabyte of source bytes, the unit of work: spans laid end to end in `payload`.

    Attributes:
        kind: whole files or a fragment, lines of JSON, records of JSON, records that are texts or token ids, or a
            message about a bad record.
        lengths: bytes of each record, one after the other (kinds "records" and "json_records").
        fragment: set where the payload is a part of one document.
    """

    kind: Literal["text", "json_lines", "json_records", "records", "tokens", "bad"]
    spans: tuple[Span, ...]
    payload: bytes
    lengths: tuple[int, ...] = ()
    fragment: Fragment | None = None

    def header(self) -> dict[str, Any]:
        """Everything but the payload, for JSON."""
        return {
            "kind": self.kind,
            "spans": [asdict(span) for span in self.spans],
            "lengths": self.lengths,
            "fragment": None if self.fragment is None else asdict(self.fragment),
        }

    @staticmethod
    def from_header(header: dict[str, Any], payload: bytes) -> "Block":
        """The inverse of `header`."""
        fragment = header["fragment"]
        return Block(
            kind=header["kind"],
            spans=tuple(Span(**span) for span in header["spans"]),
            payload=payload,
            lengths=tuple(header["lengths"]),
            fragment=None if fragment is None else Fragment(**fragment),
        )


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How bytes become documents.

    Attributes:
        field: the JSON field that holds the text, as `fields.text_of` takes it.
        on_invalid_utf8: put U+FFFD for bytes that are not UTF-8 and count them, or hold it for a bad record.
        bad_records: stop at a record that cannot be used, or leave it out and count it.
        val_fraction: the share of documents held out, by hash of their content.
        parse_special: special tokens that are written in a text become their ids.
        token_ids: whether records hold token ids, and not text.
        tails: the share of each document that is held out, its end; for where there are few documents.
    """

    field: str
    on_invalid_utf8: Literal["replace", "error"]
    bad_records: Literal["error", "skip"]
    val_fraction: float
    parse_special: bool = False
    tails: float = 0.0
    token_ids: bool = False


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document (or one fragment of one), decoded.

    Attributes:
        record: its line in the file, 0 for a whole file.
        digest: 16 bytes, `document_digest`; zeros for a fragment.
        replaced: how many U+FFFD stand for bytes that were not UTF-8.
        split_hash: what decided whether it is held out.
        ids: its token ids, where it has these and no text.
    """

    file: int
    record: int
    text: str
    held_out: bool
    digest: bytes
    replaced: int
    split_hash: float
    ids: tuple[int, ...] | None = None


def documents(block: Block, rules: Rules, bad: list[str]) -> Iterator[Document]:
    """The documents of a block, in order, without empty ones.

    Args:
        bad: gets a message for each bad record, where these are skipped.

    Raises:
        UserError: a broken JSON line, a missing field, or invalid UTF-8 where that is refused; names file and line.
    """
    for parse in _parsers(block, rules):
        try:
            document = parse()
        except Exception as error:
            problem = explain(error, block.spans[0].name)
            if rules.bad_records == "error" or not isinstance(problem, UserError):
                raise problem from error
            bad.append(str(problem))
        else:
            if document is None or not document.text:
                continue
            if rules.tails and not document.held_out and block.fragment is None and document.ids is None:
                yield from _head_and_tail(document, rules.tails)
            else:
                yield document


def _parsers(block: Block, rules: Rules) -> Iterator[partial[Document | None]]:
    """A function for each record of a block that gives its document, or raises what is wrong with it."""
    if block.kind == "bad":
        yield partial(_refuse, block.payload.decode())
        return
    offset = 0
    for span in block.spans:
        data = block.payload[offset : offset + span.size]
        offset += span.size
        if block.fragment is not None:
            yield partial(_fragment, span, data, block.fragment, rules)
        elif block.kind == "text":
            yield partial(_text, span, 0, data, rules)
        elif block.kind == "json_lines":
            for number, line in enumerate(data.split(b"\n"), start=span.record):
                if line.strip():
                    yield partial(_json, span, number, line, rules)
        else:
            start = 0
            parse = {"records": _text, "tokens": _tokens}.get(block.kind, _json)
            for number, length in enumerate(block.lengths, start=span.record):
                yield partial(parse, span, number, data[start : start + length], rules)
                start += length


def decode(data: bytes, on_invalid: Literal["replace", "error"], name: str) -> tuple[str, int]:
    """UTF-8 to text, and how many replacement characters stand in for invalid bytes."""
    try:
        return data.decode("utf-8"), 0
    except UnicodeDecodeError as error:
        if on_invalid == "error":
            raise not_utf8(name, error) from error
    text = data.decode("utf-8", errors="replace")
    return text, text.count(_REPLACEMENT) - data.count(_REPLACEMENT.encode())


def encoded(text: str, replaced: int, on_invalid: Literal["replace", "error"], name: str) -> tuple[bytes, int]:
    """Text from JSON as UTF-8, and `replaced` with what was replaced here: JSON can spell half a surrogate pair."""
    try:
        return text.encode(), replaced
    except UnicodeEncodeError:
        text, lone = decode(text.encode("utf-8", errors="surrogatepass"), on_invalid, name)
        return text.encode(), replaced + lone


def not_utf8(name: str, error: UnicodeDecodeError) -> UserError:
    """What to say of bytes that are refused."""
    return UserError(
        f"{name} is not UTF-8 ({error.reason} at byte {error.start}): "
        "convert it, or pass --on-invalid-utf8 replace to keep the rest and count what was replaced"
    )


def split_hash(data: bytes) -> float:
    """A number in [0, 1), uniform over documents: those below `Rules.val_fraction` are held out."""
    digest = hashlib.blake2b(data[:SPLIT_PREFIX], digest_size=8, person=b"meshgpt-split").digest()
    return int.from_bytes(digest, "little") / 2**64


def document_digest() -> "hashlib.blake2b":
    """A fresh 16-byte hash of a document's bytes: equal for exact duplicates."""
    return hashlib.blake2b(digest_size=16)


def as_text(line: str, field: str, where: str) -> str:
    """The text in a line of JSON.

    Raises:
        UserError: not an object, or one without text in that field.
    """
    return _record(line, text_of, field, where)


def _record(line: str, take: Callable[[dict[str, Any], str, str], _T], field: str, where: str) -> _T:
    try:
        record = json.loads(line)
    except Exception as error:
        raise explain(error, where) from error
    if not isinstance(record, dict):
        raise UserError(f"{where} holds a JSON {type(record).__name__}, not an object: each line must be one object")
    return take(record, field, where)


def _tokens(span: Span, record: int, data: bytes, rules: Rules) -> Document:
    ids = struct.unpack(f"<{len(data) // 4}I", data)
    return replace(_document(span, record, "\0" if ids else "", data, 0, rules), ids=ids)  # its worker knows its text


def tail_start(text: str, share: float) -> int:
    """Where the end of a text begins that holds about `share` of it: with a line, failing that with a word; 0: nowhere.

    What stands before and what follows both hold more than spaces.
    """
    first, size = len(text) - len(text.lstrip()), len(text.rstrip())
    wanted = size - max(1, round(size * share))
    for separator in ("\n", " "):
        for at in (text.rfind(separator, first, wanted), text.find(separator, max(first, wanted), size)):
            if at >= 0:
                return at + 1
    return 0


def _head_and_tail(document: Document, share: float) -> Iterator[Document]:
    start = tail_start(document.text, share)
    for text, held_out in ((document.text[:start], False), (document.text[start:], bool(start))):
        if text:
            digest = document_digest()
            digest.update(text.encode())
            replaced = document.replaced if not held_out else 0
            yield replace(document, text=text, held_out=held_out, digest=digest.digest(), replaced=replaced)


def _refuse(message: str) -> None:
    raise UserError(message)


def _fragment(span: Span, data: bytes, fragment: Fragment, rules: Rules) -> Document:
    text, replaced = decode(data, rules.on_invalid_utf8, span.name)
    return Document(
        file=span.file,
        record=span.record,
        text=text,
        held_out=span.held_out or fragment.split_hash < rules.val_fraction,
        digest=bytes.fromhex(fragment.digest),
        replaced=replaced + (fragment.replaced if fragment.closes else 0),
        split_hash=fragment.split_hash,
    )


def _text(span: Span, record: int, data: bytes, rules: Rules) -> Document:
    text, replaced = decode(data, rules.on_invalid_utf8, f"{span.name}:{record}" if record else span.name)
    return _document(span, record, text, data, replaced, rules)


def _json(span: Span, record: int, line: bytes, rules: Rules) -> Document:
    where = f"{span.name}:{record}"
    decoded, replaced = decode(line.removeprefix(_BOM), rules.on_invalid_utf8, where)
    if rules.token_ids:
        return _tokens(span, record, _record(decoded, ids_of, rules.field, where), rules)
    text = as_text(decoded, rules.field, where)
    data, replaced = encoded(text, replaced, rules.on_invalid_utf8, where)
    return _document(span, record, data.decode(), data, replaced, rules)


def _document(span: Span, record: int, text: str, data: bytes, replaced: int, rules: Rules) -> Document:
    digest = document_digest()
    digest.update(data)
    number = split_hash(data)
    return Document(
        file=span.file,
        record=record,
        text=text,
        held_out=span.held_out or number < rules.val_fraction,
        digest=digest.digest(),
        replaced=replaced,
        split_hash=number,
    )
