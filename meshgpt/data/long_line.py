"""One line of JSON that is too long for memory: its long strings go to temporary files, the rest is parsed as usual.

A line of 5 GB with one text of 5 GB needs some megabytes of memory and 5 GB of disk. What stays in memory is the
line's skeleton, the line with a placeholder for every string above `_LONG` bytes; `json.loads` of it says whether the
line is valid and which of the strings is the wanted field.
"""

import json
import os
import re
import tempfile
from pathlib import Path
from typing import IO, Any, final

from meshgpt.data.documents import as_text, decode, encoded
from meshgpt.data.failures import BadInputError
from meshgpt.data.fields import is_template
from meshgpt.errors import UserError

_LONG = 1 << 16
_MAX_SKELETON = 64 << 20
# Whole characters and whole escapes of a JSON string: a match never ends within either of them.
_UNITS = re.compile(rb'(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*+')
_LONGEST_ESCAPE = 6


@final
class LongLine:
    """Takes a line piece by piece (`feed`), then gives its text (`finish`).

    Args:
        where: file and line, for messages.
        field: whose text is wanted.
        on_invalid_utf8: as `documents.decode` takes it.
        scratch: a folder for temporary files, which have no name in it.
    """

    def __init__(self, where: str, field: str, on_invalid_utf8: Any, scratch: Path):
        self._where, self._field, self._on_invalid, self._scratch = where, field, on_invalid_utf8, scratch
        self._token = os.urandom(8).hex()  # no text can hold it by chance
        self._skeleton = bytearray()
        self._spools: list[IO[bytes]] = []
        self._pending = b""
        self._string: bytearray | None = None  # the short string that is being read
        self._spool: IO[bytes] | None = None  # or the long one
        self.replaced = 0

    def feed(self, data: bytes) -> None:
        """The next bytes of the line.

        Raises:
            UserError: not JSON, or too much of it besides long strings.
        """
        data = self._pending + data
        at = 0
        while at < len(data):
            at, wants_more = self._in_string(data, at) if self._string is not None else (self._between(data, at), False)
            if wants_more:
                break
        self._pending = data[at:]

    def finish(self) -> "tuple[str, IO[bytes] | None]":
        """The field's text, or "" and a file with it as UTF-8, which lasts until `close`.

        Raises:
            UserError: not JSON, no such field, or no text in it.
        """
        if self._string is not None or self._pending:
            raise self._invalid("it ends within a string")
        skeleton, replaced = decode(bytes(self._skeleton), self._on_invalid, self._where)
        self.replaced += replaced
        value = as_text(skeleton, self._field, self._where)
        if is_template(self._field) and self._token in value:
            raise BadInputError(f"{self._where} has a text too long for --template: split it, or name one --field")
        spools = {self._placeholder(i): spool for i, spool in enumerate(self._spools)}
        return ("", spools[value]) if value in spools else (value, None)

    def close(self) -> None:
        """Frees the disk."""
        for spool in [*self._spools, self._spool]:
            if spool is not None:
                spool.close()

    def _between(self, data: bytes, at: int) -> int:
        quote = data.find(b'"', at)
        stop = len(data) if quote < 0 else quote + 1
        self._skeleton += data[at:stop]
        if len(self._skeleton) > _MAX_SKELETON:
            raise UserError(f"{self._where} holds more than {_MAX_SKELETON >> 20} MiB besides long texts: split it")
        if quote >= 0:
            self._string = bytearray()
        return stop

    def _in_string(self, data: bytes, at: int) -> tuple[int, bool]:
        """Takes what is there of a string; where it got to, and whether it needs more bytes to go on."""
        match = _UNITS.match(data, at)
        assert match is not None
        end = match.end()
        closes = end < len(data) and data[end] == ord('"')
        if not closes:
            if len(data) - end >= _LONGEST_ESCAPE or (end < len(data) and data[end] != ord("\\")):
                raise self._invalid("a string has a bad escape or control character")
            end -= _unfinished(data[at:end])
        self._take(data[at:end])
        if closes:
            self._close()
            return end + 1, False
        return end, True

    def _take(self, piece: bytes) -> None:
        assert self._string is not None
        self._string += piece
        if len(self._string) < _LONG:
            return
        if self._spool is None:
            self._spool = tempfile.TemporaryFile(dir=self._scratch)  # noqa: SIM115 (`close` does)
        self._spool.write(self._unescaped(bytes(self._string)))
        self._string = bytearray()

    def _close(self) -> None:
        assert self._string is not None
        if self._spool is None:
            self._skeleton += self._string + b'"'
        else:
            self._spool.write(self._unescaped(bytes(self._string)))
            self._skeleton += json.dumps(self._placeholder(len(self._spools))).encode()[1:]
            self._spools.append(self._spool)
        self._string = self._spool = None

    def _unescaped(self, piece: bytes) -> bytes:
        text, replaced = decode(piece, self._on_invalid, self._where)
        text = json.loads(f'"{text}"')
        data, replaced = encoded(text, replaced, self._on_invalid, self._where)
        self.replaced += replaced
        return data

    def _placeholder(self, number: int) -> str:
        return f"\0{self._token}-{number}"

    def _invalid(self, what: str) -> UserError:
        return UserError(f"{self._where} is not valid JSON ({what}): repair or remove that line")


def _unfinished(piece: bytes) -> int:
    """How many bytes at a piece's end may belong to a character that goes on behind it."""
    tail = piece[-_LONGEST_ESCAPE:]
    if re.fullmatch(rb"\\u[dD][89abAB][0-9a-fA-F]{2}", tail):  # half a surrogate pair, if the backslash is no text
        before = piece[: -len(tail)]
        if (len(before) - len(before.rstrip(b"\\"))) % 2 == 0:
            return len(tail)
    for back in range(1, min(4, len(piece)) + 1):
        lead = piece[-back]
        if lead & 0xC0 != 0x80:
            width = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
            return back if width > back else 0
    return 0
