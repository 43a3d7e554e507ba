"""The safetensors file format: read one tensor at a time, written one tensor at a time.

A file is the length of the header (8 bytes, little endian), the header (JSON: name to dtype, shape and the range of its
bytes), and the bytes. Both directions are ours because the library's readers keep the whole file mapped and its writers
want every tensor of a file at once; the tests hold them against the library.

Source: https://github.com/huggingface/safetensors (README, "Format").
"""

import dataclasses
import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import ml_dtypes
import numpy as np

from meshgpt.errors import UserError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# What is read besides, and rounded on the way.
READ_DTYPES = DTYPES | {"F64": np.dtype(np.float64)}
_BYTES = {"U8": np.dtype(np.uint8), "I8": np.dtype(np.int8)}  # what quantized weights are kept in
_CODES = {dtype: code for code, dtype in (READ_DTYPES | _BYTES).items()}
_OTHER_SIZES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_LONGEST_HEADER = 100_000_000  # the library's own limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """Where one tensor lies: `code` is the format's name of its dtype, `start` its first byte in `file`."""

    file: Path
    code: str
    shape: tuple[int, ...]
    start: int

    def map(self) -> np.ndarray:
        """The tensor, memory-mapped read-only for as long as the array lives."""
        dtype = (READ_DTYPES | _BYTES)[self.code]
        if math.prod(self.shape) == 0:
            return np.empty(self.shape, dtype)
        return np.memmap(self.file, dtype, "r", self.start, self.shape)


def read_header(file: Path) -> dict[str, Entry]:
    """Every tensor in `file`, checked to lie inside it.

    Raises:
      UserError: if the file is cut short, or is not a safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(size - 8, _LONGEST_HEADER):
            raise UserError(f"{file} is cut short or is not a safetensors file; download or export it again")
        header = stream.read(length)
    try:
        table = json.loads(header)
        entries = {name: _entry(file, size, 8 + length, row) for name, row in table.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} has a broken header ({error}); download or export it again") from error
    return entries


def _entry(file: Path, size: int, base: int, row: dict) -> Entry:
    start, stop = row["data_offsets"]
    shape = tuple(row["shape"])
    if not all(isinstance(number, int) and number >= 0 for number in (start, stop, *shape)):
        raise ValueError(f"sizes {row}")
    itemsize = DTYPES[row["dtype"]].itemsize if row["dtype"] in DTYPES else _OTHER_SIZES.get(row["dtype"])
    if itemsize is not None and stop - start != math.prod(shape) * itemsize:
        raise ValueError(f"{stop - start} bytes for shape {shape} of {row['dtype']}")
    if base + stop > size:
        raise UserError(
            f"{file} is cut short: it has {size:,} bytes and its header promises at least {base + stop:,}; "
            "download or export it again"
        )
    return Entry(file=file, code=row["dtype"], shape=shape, start=base + start)


class Writer:
    """Writes one file: the names and shapes are known beforehand, the contents come one tensor at a time, in order.

    Equal contents give equal bytes: the header holds nothing but names, dtype, shapes and ranges.
    """

    def __init__(self, file: Path, shapes: Sequence[tuple[str, tuple[int, ...]]], dtype: np.dtype) -> None:
        self._expected = list(shapes)
        self._dtype = np.dtype(dtype)
        self._stream = file.open("xb")
        self._stream.write(_header(self._expected, self._dtype))

    def add(self, name: str, contents: np.ndarray) -> None:
        """Writes the next tensor; it must be the one that was announced."""
        assert self._expected.pop(0) == (name, contents.shape), f"{name} {contents.shape} was not announced"
        assert contents.dtype == self._dtype, f"{name} is {contents.dtype}"
        np.ascontiguousarray(contents).tofile(self._stream)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stream.close()
        assert kind is not None or not self._expected, f"not written: {self._expected}"


class MixedWriter:
    """Writes one file of tensors of any dtypes, which nobody knows beforehand: the header comes last.

    `header_bytes` are kept free for it; what it leaves of them is spaces, as the format allows.
    """

    def __init__(self, file: Path, header_bytes: int) -> None:
        self._announced: list[tuple[str, tuple[int, ...], np.dtype]] = []
        self._room = header_bytes + -header_bytes % 8
        self._stream = file.open("xb")
        self._stream.seek(8 + self._room)
        self.nbytes = 0

    def add(self, name: str, contents: np.ndarray) -> None:
        """Writes the next tensor."""
        self._announced.append((name, contents.shape, contents.dtype))
        np.ascontiguousarray(contents).tofile(self._stream)
        self.nbytes += contents.nbytes

    def __enter__(self) -> "MixedWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._stream:
            if kind is None:
                self._stream.seek(0)
                self._stream.write(_framed(self._announced, self._room))


def _header(shapes: Sequence[tuple[str, tuple[int, ...]]], dtype: np.dtype) -> bytes:
    return _framed([(name, shape, dtype) for name, shape in shapes])


def _framed(tensors: Sequence[tuple[str, tuple[int, ...], np.dtype]], room: int = 0) -> bytes:
    table: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    start = 0
    for name, shape, dtype in tensors:
        stop = start + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    assert len(text) <= room or not room, f"a header of {len(text)} bytes in {room}"
    return struct.pack("<Q", max(len(text), room)) + text.ljust(room)
