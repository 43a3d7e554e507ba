"""The `.npz` files of a checkpoint that is cut into shards: headers first, one array at a time, and no pickles."""

import contextlib
import dataclasses
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from meshgpt.errors import UserError

_BFLOAT16 = np.dtype("V2")  # NumPy has no name for it and saves two bytes of anything
_CODES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", _BFLOAT16: "BF16"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One array of every shard: the `member` of each of `files`, all of one shape and dtype."""

    files: tuple[Path, ...]
    member: str
    code: str
    shape: tuple[int, ...]

    @property
    def shards(self) -> int:
        return len(self.files)

    def read(self, shard: int) -> np.ndarray:
        """The array of one shard."""
        with _told(self.files[shard]), np.load(self.files[shard], allow_pickle=False) as arrays:
            array = arrays[self.member.removesuffix(".npy")]
        return array.view(ml_dtypes.bfloat16) if array.dtype == _BFLOAT16 else array


def read_leaves(folder: Path, files: int) -> list[Leaf]:
    """Every array of `folder`/shard_*/{0..files-1}.npz, in order; only the headers are read.

    Raises:
      UserError: a shard or file is missing, cut short, holds objects, or differs from shard 0's.
    """
    shards = len([path for path in folder.glob("shard_*") if path.is_dir()])
    missing = [
        f"shard_{shard}/{number}.npz"
        for shard in range(shards)
        for number in range(files)
        if not (folder / f"shard_{shard}" / f"{number}.npz").is_file()
    ]
    if missing:
        listed = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise UserError(f"{folder} is not whole; missing: {listed}. Download them again")
    leaves: list[Leaf] = []
    for number in range(files):
        paths = tuple(folder / f"shard_{shard}" / f"{number}.npz" for shard in range(shards))
        headers = [_headers(path) for path in paths]
        for path, other in zip(paths, headers, strict=True):
            if other != headers[0]:
                raise UserError(f"{path} holds other arrays than {paths[0]}: these are shards of two checkpoints")
        leaves += [Leaf(files=paths, member=name, code=code, shape=shape) for name, code, shape in headers[0]]
    return leaves


def scalar(leaf: Leaf) -> int:
    """The value of a leaf that is one whole number."""
    value = leaf.read(0)
    if value.size != 1 or value.dtype.kind not in "iu":
        raise UserError(f"{leaf.files[0]}: {leaf.member} is {leaf.code} {leaf.shape}; one whole number was expected")
    return int(value.reshape(()))


def _headers(path: Path) -> list[tuple[str, str, tuple[int, ...]]]:
    with _told(path), zipfile.ZipFile(path) as archive:
        return [(name, *_header(archive, name)) for name in archive.namelist()]


def _header(archive: zipfile.ZipFile, name: str) -> tuple[str, tuple[int, ...]]:
    with archive.open(name) as stream:
        version = np.lib.format.read_magic(stream)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never read")
    return _CODES.get(dtype, str(dtype)), shape


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, NotImplementedError) as error:
        raise UserError(f"{path} is cut short or broken ({error}); download it again") from error
