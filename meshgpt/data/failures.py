"""One place that says what is wrong with an input, whatever was raised by the library that read it.

A reader lets errors pass; `explain` turns each into file, line or row, what, and the remedy.
"""

import gzip
import json
import lzma
import sys
import tarfile
import zipfile
import zlib
from typing import Any

from meshgpt.errors import MachineError, UserError, explained

_DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError)


class BadInputError(UserError):
    """Of what is in a file, and not of how it was asked for: `--bad-records skip` counts it and goes on."""


def explain(error: Exception, where: str) -> UserError | MachineError:
    """What to raise for an error that reading `where`, a file with a line or row, ended in."""
    if isinstance(error, UserError | MachineError):
        return error
    said = _first_line(error)
    if isinstance(error, _DAMAGED) or _is(error, "zstandard", "ZstdError"):
        return BadInputError(f"{where} is damaged or cut short ({said}): fetch it again")
    if _is(error, "pyarrow", "ArrowException"):
        return BadInputError(f"{where} is no parquet file, or a damaged one ({said}): fetch it again")
    if isinstance(error, json.JSONDecodeError | RecursionError):
        return BadInputError(f"{where} is not valid JSON ({said}): repair or remove that line")
    if isinstance(error, UnicodeError):
        return BadInputError(f"{where} is not UTF-8 ({said}): convert it, or remove it")
    if isinstance(error, ValueError) and "integer string conversion" in said:
        return BadInputError(f"{where} holds a number of more than {sys.get_int_max_str_digits():,} digits: shorten it")
    if isinstance(error, ImportError):
        return UserError(f"{where} cannot be read ({said}): install that package")
    if isinstance(error, OSError):
        return explained(error, f"cannot read {where}: {error.strerror or said}")
    if isinstance(error, MemoryError):
        return MachineError(f"memory ran out while reading {where}: free some, or split what is there")
    return BadInputError(f"{where} cannot be read ({type(error).__name__}: {said}): repair or remove it")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _is(error: Exception, module: str, name: str) -> bool:
    """Whether it is one of a library that need not be installed."""
    kind: Any = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(error, kind)
