"""SHA-256 manifests of folders, so that a damaged checkpoint file is named and never loaded.

The manifest of `<folder>` is `<folder>.digests.json` beside it: the relative path, size and digest of every file.
"""

import hashlib
import json
import os
import stat
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from meshgpt.atomic import sync, write_atomically

Files: TypeAlias = dict[str, dict[str, Any]]  # the size and sha256 of files, by their paths in the folder

SUFFIX = ".digests.json"
_VERSION = 1
_THREADS = min(16, os.cpu_count() or 1)
_PIECE_BYTES = 1 << 20
_LOOK_SECONDS = 2.0  # between two calls of `progress`
_NAMED_AT_MOST = 3


class DamagedError(Exception):
    """A folder is not what its manifest says. The message names the files and what is wrong with each."""


def manifest_path(folder: Path) -> Path:
    return folder.with_name(folder.name + SUFFIX)


def write_manifest(folder: Path, known: Files | None = None, progress: Callable[[], None] = lambda: None) -> None:
    """Makes every file of `folder` durable, then writes its manifest: whole or not at all, whenever the power fails.

    Args:
        known: what `digest_files` found elsewhere; a file that is not in it, or has another size here, is read here.
        progress: as `digest_files` has it.

    Raises:
        DamagedError: the folder holds something that is not a plain file.
        OSError: the disk is full, or a file cannot be read.
    """
    sizes, known = list_files(folder), known or {}
    files = {path: known[path] for path, size in sizes.items() if path in known and known[path]["size"] == size}
    files |= digest_files(folder, {path: size for path, size in sizes.items() if path not in files}, progress)
    for directory, _, _ in os.walk(folder):
        sync(Path(directory))
    manifest = _signed({"version": _VERSION, "folder": folder.name, "files": files})
    write_atomically(manifest_path(folder), _canonical(manifest))


def digest_files(folder: Path, sizes: Mapping[str, int], progress: Callable[[], None] = lambda: None) -> Files:
    """Makes files of `folder` durable and gives what a manifest says of them.

    Args:
        sizes: the size of each file, by its path in `folder`.
        progress: called every few seconds in which something was read.

    Raises:
        DamagedError: a file cannot be read, or has another size.
    """
    digests = _digests([folder / path for path in sizes], progress, durable=True)
    for path, size in sizes.items():
        if (folder / path).stat().st_size != size:
            raise DamagedError(f"{path} has not {size:,} bytes")
    return {path: {"size": sizes[path], "sha256": digest} for path, digest in zip(sizes, digests, strict=True)}


def share(sizes: Mapping[str, int], part: tuple[int, int]) -> dict[str, int]:
    """Part i of n, (i, n), of files given with their sizes: the parts have about the same number of bytes."""
    largest_first = sorted(sizes, key=lambda path: (sizes[path], path), reverse=True)
    return {path: sizes[path] for path in largest_first[part[0] :: part[1]]}


def verify(folder: Path, part: tuple[int, int] = (0, 1), progress: Callable[[], None] = lambda: None) -> None:
    """Compares every file of `folder` with its manifest. What can be seen without reading the files comes first.

    Args:
        part: (i, n) reads the i-th of n parts of the files only, of about the same size.

    Raises:
        DamagedError: a file is missing, truncated, changed or extra, or the manifest itself is missing or damaged.
    """
    files = _read_manifest(folder)
    if not folder.is_dir():
        raise DamagedError("its folder is missing")
    sizes = list_files(folder)
    problems = [f"{path} is missing" for path in files if path not in sizes]
    problems += [f"{path} is not in the manifest" for path in sizes if path not in files]
    problems += [
        f"{path} has {sizes[path]:,} bytes instead of {entry['size']:,}"
        for path, entry in files.items()
        if path in sizes and sizes[path] != entry["size"]
    ]
    if not problems:
        read = list(share({path: entry["size"] for path, entry in files.items()}, part))
        digests = _digests([folder / path for path in read], progress, durable=False)
        pairs = sorted(zip([(path, files[path]) for path in read], digests, strict=True), key=lambda pair: pair[0][0])
        problems = [f"{path} does not match its digest" for (path, entry), digest in pairs if digest != entry["sha256"]]
    if problems:
        more = len(problems) - _NAMED_AT_MOST
        raise DamagedError("; ".join(problems[:_NAMED_AT_MOST]) + (f"; and {more} more" if more > 0 else ""))


def size(folder: Path) -> int:
    """Bytes in all files of `folder`."""
    return sum(list_files(folder).values())


def list_files(folder: Path) -> dict[str, int]:
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


def _digests(paths: Sequence[Path], progress: Callable[[], None], *, durable: bool) -> list[str]:
    """The digests of files, which are read in several threads; `progress` is called in this one."""
    moved = threading.Event()
    with ThreadPoolExecutor(_THREADS) as pool:
        jobs = [pool.submit(_digest, path, moved.set, durable=durable) for path in paths]
        while futures.wait(jobs, _LOOK_SECONDS, futures.FIRST_EXCEPTION).not_done and not any(map(_failed, jobs)):
            if moved.is_set():
                moved.clear()
                progress()
        for job in jobs:
            job.cancel()  # after a failure; otherwise all are done
    return [job.result() for job in jobs if not job.cancelled()]


def _failed(job: futures.Future[str]) -> bool:
    return job.done() and job.exception() is not None


def _digest(path: Path, moved: Callable[[], None], *, durable: bool) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_PIECE_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                moved()
            if durable:
                os.fsync(file.fileno())
            return digest.hexdigest()
    except OSError as error:
        raise DamagedError(f"{path.name} cannot be read ({error.strerror})") from error


def _read_manifest(folder: Path) -> Files:
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
