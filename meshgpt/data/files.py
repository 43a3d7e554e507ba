"""Files: their digests, and replacing one whole."""

import hashlib
import os
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


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file so that it is either the old or the new one, even after a power failure."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
