"""Files: their contents in pieces, and their digests."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

_COPY_BYTES = 1 << 20


def chunks(path: Path) -> Iterator[bytes]:
    """A file's bytes, a piece at a time."""
    with open(path, "rb") as file:
        while data := file.read(_COPY_BYTES):
            yield data


def file_sha256(path: Path) -> str:
    """The digest of a file, read in pieces."""
    digest = hashlib.sha256()
    for data in chunks(path):
        digest.update(data)
    return digest.hexdigest()
