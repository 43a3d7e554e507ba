"""Files of JSON that are not one value a line: an array of records, an object over many lines, objects end to end.

The file is only cut into values here, in bounded memory; `json.loads` judges each.
"""

import re
from collections.abc import Iterator
from typing import IO

from meshgpt.data.failures import BadInputError

_CHUNK_BYTES = 1 << 20
_SPACE = b" \t\r\n"
_TRIED_LINES = 10
_MARKS = re.compile(rb'["\[\]{},]')
_STRING = re.compile(rb'(?:[^"\\]|\\.)*+', re.DOTALL)  # up to its end, or to half an escape at the end of what is there


def one_a_line(head: bytes) -> bool:
    """Whether JSON that begins so has a whole object in one of its first lines: then it is JSON lines."""
    if not head.lstrip(_SPACE).startswith(b"{"):
        return False
    lines = head.lstrip(_SPACE).split(b"\n", _TRIED_LINES)[:_TRIED_LINES]
    return any(line.startswith(b"{") and [e for _, e in _Cutter(0).feed(line.rstrip())] == [True] for line in lines)


def json_values(stream: IO[bytes], where: str) -> Iterator[tuple[bytes, bool]]:
    """The values in a file as pieces of bytes, each with whether a value ends with it.

    Raises:
        BadInputError: something behind an array's end, or no end.
    """
    cutter: _Cutter | None = None
    while chunk := stream.read(_CHUNK_BYTES):
        if cutter is None:
            chunk = chunk.lstrip(_SPACE)
            if not chunk:
                continue
            is_array = chunk.startswith(b"[")
            cutter = _Cutter(1 if is_array else 0)
            chunk = chunk[is_array:]
        yield from cutter.feed(chunk)
        if cutter.rest.strip(_SPACE):
            raise BadInputError(f"{where} has something behind the end of its array: remove it, or make it JSON lines")
    if cutter is not None and cutter.depth and cutter.base:
        raise BadInputError(f"{where} is damaged or cut short (its array has no end): fetch it again")
    if cutter is not None and cutter.begun:
        yield b"", True


class _Cutter:
    """Follows strings and brackets through a stream, a chunk at a time.

    Attributes:
        base: the depth at which values lie: 1 in an array, whose own bracket is not fed.
        depth: of brackets.
        begun: whether a value is.
        rest: what is behind the array's end.
    """

    def __init__(self, base: int):
        self.base = self.depth = base
        self.begun = False
        self.rest = b""
        self._in_string = False
        self._comma = False
        self._over = False

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bool]]:
        """The pieces of values in the next bytes, each with whether a value ends with it."""
        if self._over:
            self.rest = data
            return
        start = at = 0
        while at < len(data):
            at, mark = self._next(data, at)
            if mark in (b"[", b"{"):
                self.depth += 1
            elif mark in (b"]", b"}"):
                self.depth -= 1
                if self.base and not self.depth:
                    yield from self._end(data[start : at - 1], self._comma)
                    self._over, self.rest = True, data[at:]
                    return
                if not self.base and self.depth <= 0:
                    self.depth = 0
                    yield from self._end(data[start:at], True)
                    start = at
            elif mark == b"," and self.depth == self.base == 1:
                self._comma = True
                yield from self._end(data[start : at - 1], True)
                start = at
        piece = data[start:]
        if self.begun or piece.strip(_SPACE):
            self.begun = True
            yield piece, False

    def _end(self, piece: bytes, even_if_empty: bool) -> Iterator[tuple[bytes, bool]]:
        if self.begun or even_if_empty or piece.strip(_SPACE):
            yield piece, True
        self.begun = False

    def _next(self, data: bytes, at: int) -> tuple[int, bytes]:
        """Where to go on, and the bracket or comma before that place, if there is one."""
        if not self._in_string:
            found = _MARKS.search(data, at)
            if found is None:
                return len(data), b""
            self._in_string = found.group() == b'"'
            return found.end(), found.group()
        if self._escape:
            self._escape = False
            return at + 1, b""
        found = _STRING.match(data, at)
        assert found is not None
        end = found.end()
        self._in_string = end == len(data) or data[end] != ord('"')
        self._escape = self._in_string and end < len(data)
        return end + 1, b""

    _escape = False  # a backslash ended the last chunk
