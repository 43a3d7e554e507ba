"""Replacing a file or a folder in one piece: a reader, a kill and a power failure find the old one or the new one."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields a path beside `path` to write a file at, which takes its place at the end, and goes if anything fails.

    Args:
        durable: the contents reach the disk before the new name does. Without it a power failure may leave the new
            name with an empty file, which only suits a file that nobody reads after one.
    """
    scratch = path.with_name(path.name + ".tmp")
    try:
        yield scratch
        if durable:
            sync(scratch)
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_atomically(path: Path, contents: str | bytes, *, durable: bool = True) -> None:
    """Replaces the file at `path`; text is UTF-8."""
    with replacing(path, durable=durable) as scratch:
        scratch.write_bytes(contents.encode() if isinstance(contents, str) else contents)


def rename_folder(folder: Path, name: Path) -> None:
    """Gives a finished folder its name, where nothing but an empty folder may be, once all of it is on the disk."""
    for directory, _, files in os.walk(folder):
        for file in files:
            sync(Path(directory) / file)
        sync(Path(directory))
    os.replace(folder, name)
    sync(name.parent)


def sync(path: Path) -> None:
    """Brings a file's contents, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
