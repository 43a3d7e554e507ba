"""Standard input as a source: kept in a temporary file, so that it can be read as often as any file."""

import hashlib
import os
import sys
import tempfile
import weakref
from dataclasses import dataclass, field

from meshgpt.data import formats
from meshgpt.data.text_files import SourceFile
from meshgpt.errors import UserError, explained

NAME = "-"
_COPY_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class _Spooled(SourceFile):
    """What came from standard input. holder: its temporary file goes when this does."""

    holder: "_Holder" = field(repr=False)


class _Holder:
    """Something that can go."""


def spooled() -> SourceFile:
    """Reads standard input to its end.

    Its version is the digest of its contents: the same text again goes on where an interrupted `prepare` stopped.

    Raises:
        UserError: a terminal, or the disk is full.
    """
    if sys.stdin.isatty():
        raise UserError("source '-' is standard input, which is a terminal: pipe a text into it (cat FILE | ...)")
    digest = hashlib.sha256()
    size, head = 0, b""
    try:
        descriptor, path = tempfile.mkstemp(prefix="meshgpt-standard-input-")
        holder = _Holder()
        weakref.finalize(holder, os.unlink, path)
        with open(descriptor, "wb") as spool:
            while data := sys.stdin.buffer.read(_COPY_BYTES):
                head = head or data
                digest.update(data)
                size += len(data)
                spool.write(data)
    except OSError as error:
        folder = tempfile.gettempdir()
        raise explained(error, f"cannot keep standard input in {folder} ({error.strerror}): set TMPDIR") from error
    return _Spooled(
        path=path,
        name="standard input" + formats.compression_of(head),
        size=size,
        version=digest.hexdigest(),
        standard_input=True,
        holder=holder,
    )
