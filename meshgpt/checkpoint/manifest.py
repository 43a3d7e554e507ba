"""SHA-256 manifests of folders, so that a damaged checkpoint file is named and never loaded.

The manifest of `<folder>` is `<folder>.digests.json` beside it: the relative path, size and digest of every file.
"""

import hashlib
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

SUFFIX = ".digests.json"
_VERSION = 1
_THREADS = min(16, os.cpu_count() or 1)
_NAMED_AT_MOST = 3


class DamagedError(Exception):
    """A folder is not what its manifest says. The message names the files and what is wrong with each."""


def manifest_path(folder: Path) -> Path:
    return folder.with_name(folder.name + SUFFIX)


def write_manifest(folder: Path) -> None:
    """Makes every file of `folder` durable, then writes its manifest: whole or not at all, whenever the power fails.

    Raises:
        DamagedError: the folder holds something that is not a plain file.
        OSError: the disk is full, or a file cannot be read.
    """
    sizes = _sizes(folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda path: _digest(folder / path, durable=True), sizes))
    for directory, _, _ in os.walk(folder):
        _sync_folder(Path(directory))
    digest_of = dict(zip(sizes, digests, strict=True))
    files = {path: {"size": size, "sha256": digest_of[path]} for path, size in sizes.items()}
    manifest = manifest_path(folder)
    unfinished = manifest.with_name(manifest.name + ".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(_canonical(_signed({"version": _VERSION, "folder": folder.name, "files": files})))
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(manifest)
    _sync_folder(folder.parent)


def verify(folder: Path, part: tuple[int, int] = (0, 1)) -> None:
    """Compares every file of `folder` with its manifest. What can be seen without reading the files comes first.

    Args:
        part: (i, n) reads the i-th of n parts of the files only, of about the same size.

    Raises:
        DamagedError: a file is missing, truncated, changed or extra, or the manifest itself is missing or damaged.
    """
    files = _read_manifest(folder)
    if not folder.is_dir():
        raise DamagedError("its folder is missing")
    sizes = _sizes(folder)
    problems = [f"{path} is missing" for path in files if path not in sizes]
    problems += [f"{path} is not in the manifest" for path in sizes if path not in files]
    problems += [
        f"{path} has {sizes[path]:,} bytes instead of {entry['size']:,}"
        for path, entry in files.items()
        if path in sizes and sizes[path] != entry["size"]
    ]
    if not problems:
        index, count = part
        read = sorted(files, key=lambda path: (files[path]["size"], path), reverse=True)[index::count]
        with ThreadPoolExecutor(_THREADS) as pool:
            digests = list(pool.map(lambda path: _digest(folder / path, durable=False), read))
        pairs = sorted(zip([(path, files[path]) for path in read], digests, strict=True), key=lambda pair: pair[0][0])
        problems = [f"{path} does not match its digest" for (path, entry), digest in pairs if digest != entry["sha256"]]
    if problems:
        more = len(problems) - _NAMED_AT_MOST
        raise DamagedError("; ".join(problems[:_NAMED_AT_MOST]) + (f"; and {more} more" if more > 0 else ""))


def size(folder: Path) -> int:
    """Bytes in all files of `folder`."""
    return sum(_sizes(folder).values())


def _sizes(folder: Path) -> dict[str, int]:
    """Relative POSIX path -> bytes of every file, sorted. Links are refused: they could lead out of the folder."""
    found = {}
    for directory, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(directory) / name).is_symlink()]
        for name in names + links:
            path = Path(directory) / name
            relative = path.relative_to(folder).as_posix()
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                raise DamagedError(f"{relative} is not a plain file")
            found[relative] = status.st_size
    return dict(sorted(found.items()))


def _digest(path: Path, *, durable: bool) -> str:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if durable:
                os.fsync(file.fileno())
            return digest
    except OSError as error:
        raise DamagedError(f"{path.name} cannot be read ({error.strerror})") from error


def _sync_folder(folder: Path) -> None:
    """A new name survives a power failure only once its folder was synced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    manifest = manifest_path(folder)
    try:
        text = manifest.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DamagedError(f"it has no {manifest.name}: its save did not finish or is still under way") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"{manifest.name} cannot be read ({error})") from error
    try:
        document = json.loads(text)
        # The text counts too: a flipped bit that JSON forgives (white space, a duplicate key) is still damage.
        intact = document == _expected(document, folder.name) and text == _canonical(document)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise DamagedError(f"{manifest.name} is damaged")
    for path in document["files"]:
        if not _inside(path):
            raise DamagedError(f"{manifest.name} names {path!r}, which is not a path inside the folder")
    return document["files"]


def _expected(document: Any, name: str) -> dict[str, Any]:
    """The document that `document` must equal: known fields of the right type and nothing else."""
    files = {
        path: {"size": int(entry["size"]), "sha256": str(entry["sha256"])} for path, entry in document["files"].items()
    }
    return _signed({"version": _VERSION, "folder": name, "files": files})


def _signed(document: dict[str, Any]) -> dict[str, Any]:
    """With its own digest, so that a damaged manifest is not taken for damaged files."""
    return document | {"sha256": hashlib.sha256(_canonical(document).encode()).hexdigest()}


def _inside(path: str) -> bool:
    pure = PurePosixPath(path)
    plain = pure.as_posix() == path and "\\" not in path and "\0" not in path
    return plain and path != "." and not pure.is_absolute() and ".." not in pure.parts


def _canonical(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1, sort_keys=True) + "\n"
