"""Text that is not UTF-8: read as UTF-8, by the encoding that was named or the one that was recognised."""

import codecs
from typing import IO

from meshgpt.errors import UserError

UTF8 = "utf-8"
DETECT = "detect"
_BLOCK = 1 << 20
_HEAD = 1 << 16  # bytes by which an encoding is recognised
_MARKS = (
    (codecs.BOM_UTF8, UTF8),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, with whose mark it begins
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def check(name: str) -> None:
    """Raises UserError for an encoding that Python does not have, or that is no encoding of text."""
    if name == DETECT:
        return
    try:
        usable = codecs.lookup(name)._is_text_encoding  # pyright: ignore[reportAttributeAccessIssue]
    except LookupError:
        usable = False
    if not usable:
        raise UserError(
            f"--encoding {name!r} is not known: give one of Python's, such as utf-8, utf-16, latin-1, cp1252, "
            f"shift_jis, or {DETECT!r}"
        )


def as_utf8(stream: IO[bytes], encoding: str) -> IO[bytes]:
    """A stream of text in `encoding` as one of UTF-8. What is no text in it becomes U+FFFD."""
    if encoding == UTF8:
        return stream
    return _Converted(stream, encoding)  # pyright: ignore[reportReturnType]


def recognised(head: bytes) -> str:
    """The encoding of a text that begins with `head`, by its mark; UTF-8 without one. Bytes alone make no proof."""
    return next((name for mark, name in _MARKS if head.startswith(mark)), UTF8)


class _Converted:
    """What `as_utf8` gives."""

    def __init__(self, stream: IO[bytes], encoding: str):
        self._stream = stream
        self._ready = b""
        head = stream.read(_HEAD)
        name = recognised(head) if encoding == DETECT else encoding
        self._plain = codecs.lookup(name).name == UTF8  # invalid bytes stay, to be counted where they are decoded
        self._decoder = codecs.getincrementaldecoder(name)(errors="replace")
        self._take(head, final=not head)
        self._ended = not head

    def read(self, size: int = -1) -> bytes:
        while not self._ended and (size < 0 or len(self._ready) < size):
            data = self._stream.read(_BLOCK)
            self._ended = not data
            self._take(data, final=not data)
        size = len(self._ready) if size < 0 else size
        data, self._ready = self._ready[:size], self._ready[size:]
        return data

    def _take(self, data: bytes, *, final: bool) -> None:
        self._ready += data if self._plain else self._decoder.decode(data, final).encode()
