"""A block of source bytes, and the documents in it: decoding, JSON lines, and which documents are held out.

Everything here is a pure function of the bytes, so it may run in any process.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from meshgpt.errors import UserError

SPLIT_PREFIX = 65_536  # bytes of a document that decide its split, so that a document of any size is decided at once
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """A part of one document that is larger than a block.

    Attributes:
        opens, closes: whether it is the document's first, its last.
        split_hash: `split_hash` of the document.
        digest: `document_digest` of the whole document (hexadecimal), known with the last part only.
    """

    opens: bool
    closes: bool
    split_hash: float
    digest: str | None


@dataclass(frozen=True, kw_only=True)
class Span:
    """One file's bytes within a block.

    Attributes:
        file: the file's number, in the order of reading.
        name: its name, for messages.
        record: the line number of the first line (JSON lines), 0 for a text file.
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
    """About a megabyte of source bytes, the unit of work: spans laid end to end in `payload`."""

    kind: Literal["text", "json_lines"]
    spans: tuple[Span, ...]
    payload: bytes
    fragment: Fragment | None = None

    def header(self) -> dict[str, Any]:
        """Everything but the payload, for JSON."""
        return {
            "kind": self.kind,
            "spans": [asdict(span) for span in self.spans],
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
            fragment=None if fragment is None else Fragment(**fragment),
        )


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How bytes become documents.

    Attributes:
        field: the JSON field that holds the text.
        on_invalid_utf8: put U+FFFD for bytes that are not UTF-8 and count them, or refuse.
        val_fraction: the share of documents held out, by hash of their content.
    """

    field: str
    on_invalid_utf8: Literal["replace", "error"]
    val_fraction: float


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document (or one fragment of one), decoded.

    Attributes:
        record: its line in the file, 0 for a whole file.
        digest: 16 bytes, `document_digest`; zeros for a fragment.
        replaced: how many U+FFFD stand for bytes that were not UTF-8.
    """

    file: int
    record: int
    text: str
    held_out: bool
    digest: bytes
    replaced: int


def documents(block: Block, rules: Rules) -> Iterator[Document]:
    """The documents of a block, in order, without empty ones.

    Raises:
        UserError: a broken JSON line, a missing field, or invalid UTF-8 where that is refused; names file and line.
    """
    offset = 0
    for span in block.spans:
        data = block.payload[offset : offset + span.size]
        offset += span.size
        if block.kind == "json_lines":
            yield from _json_documents(span, data, rules)
        elif block.fragment is not None:
            text, replaced = decode(data, rules.on_invalid_utf8, span.name)
            held_out = span.held_out or block.fragment.split_hash < rules.val_fraction
            yield Document(file=span.file, record=0, text=text, held_out=held_out, digest=bytes(16), replaced=replaced)
        elif data:
            text, replaced = decode(data, rules.on_invalid_utf8, span.name)
            yield _document(span, 0, text, data, replaced, rules)


def decode(data: bytes, on_invalid: Literal["replace", "error"], name: str) -> tuple[str, int]:
    """UTF-8 to text, and how many replacement characters stand in for invalid bytes."""
    try:
        return data.decode("utf-8"), 0
    except UnicodeDecodeError as error:
        if on_invalid == "error":
            raise UserError(
                f"{name} is not UTF-8 ({error.reason} at byte {error.start}): "
                "convert it, or pass --on-invalid-utf8 replace to keep the rest and count what was replaced"
            ) from error
    text = data.decode("utf-8", errors="replace")
    return text, text.count(_REPLACEMENT) - data.count(_REPLACEMENT.encode())


def split_hash(data: bytes) -> float:
    """A number in [0, 1), uniform over documents: those below `Rules.val_fraction` are held out."""
    digest = hashlib.blake2b(data[:SPLIT_PREFIX], digest_size=8, person=b"meshgpt-split").digest()
    return int.from_bytes(digest, "little") / 2**64


def document_digest() -> "hashlib.blake2b":
    """A fresh 16-byte hash of a document's bytes: equal for exact duplicates."""
    return hashlib.blake2b(digest_size=16)


def _document(span: Span, record: int, text: str, data: bytes, replaced: int, rules: Rules) -> Document:
    digest = document_digest()
    digest.update(data)
    held_out = span.held_out or split_hash(data) < rules.val_fraction
    return Document(
        file=span.file, record=record, text=text, held_out=held_out, digest=digest.digest(), replaced=replaced
    )


def _json_documents(span: Span, data: bytes, rules: Rules) -> Iterator[Document]:
    for line_number, line in enumerate(data.split(b"\n"), start=span.record):
        if not line.strip():
            continue
        where = f"{span.name}:{line_number}"
        decoded, replaced = decode(line, rules.on_invalid_utf8, where)
        text = _json_text(decoded, rules.field, where)
        try:
            encoded = text.encode()
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which is no character
            text, lone = decode(text.encode("utf-8", errors="surrogatepass"), rules.on_invalid_utf8, where)
            replaced += lone
            encoded = text.encode()
        if encoded:
            yield _document(span, line_number, text, encoded, replaced, rules)


def _json_text(line: str, field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}): repair or remove that line") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} holds a JSON {type(record).__name__}, not an object: each line must be one object")
    if field not in record:
        raise UserError(f"{where} has no field {field!r}, only {sorted(record)}: name the text's with --field")
    if not isinstance(record[field], str):
        kind = type(record[field]).__name__
        raise UserError(f"{where}: field {field!r} is a {kind}, not text: name another with --field")
    return record[field]
