"""A folder that appears under its name complete, or not at all."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax

from meshgpt.atomic import rename_folder
from meshgpt.distributed import processes
from meshgpt.errors import UserError, explained

_SPARE_BYTES = 64_000_000  # tokenizer, JSON and what the file system needs for itself


def first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def staged(out: Path, total: int, *, marker: str, replace: bool) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end, and goes if anything fails on the way.

    Args:
      total: bytes that will be written; the disk is checked for them.
      marker: a file that says that what is at `out` is an earlier one of the same kind.
      replace: an earlier one gives way; anything else there is refused in any case.
    """
    out = out.absolute()
    folder = out.with_name(f".{out.name}.partial")
    if first():
        _check_free(out, marker=marker, replace=replace)
        _make(folder, total)
    processes.meet()
    try:
        yield folder
        processes.meet()
        if first():
            _rename(folder, out)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"{out}: the disk is full; {total:,} bytes are needed. Nothing was left behind") from error
    finally:
        if first():
            shutil.rmtree(folder, ignore_errors=True)


def _check_free(out: Path, *, marker: str, replace: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / marker).is_file():
        raise UserError(f"{out} exists and is not an exported model; name another folder")
    if not replace:
        raise UserError(f"{out} holds a model already; name another folder, or ask to replace it")


def _make(folder: Path, total: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # what a killed export left
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise explained(error, f"cannot write to {folder.parent}: {error.strerror}") from error
    free = shutil.disk_usage(folder).free
    if free < total + _SPARE_BYTES:
        folder.rmdir()
        raise UserError(
            f"{folder.parent} has {free:,} bytes free and the export takes {total + _SPARE_BYTES:,}; "
            "free some space, or name a folder on another disk"
        )


def _rename(folder: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    rename_folder(folder, out)
    shutil.rmtree(old, ignore_errors=True)
