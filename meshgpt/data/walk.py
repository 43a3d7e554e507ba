"""The files of a folder, however deep it is; what is not read is counted."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from meshgpt.data.unread import Unread
from meshgpt.errors import explained

OTHER_ENDING = "another ending, see --extensions"
HIDDEN = "hidden"
STORE = "a token store"
LINKED = "a link to a folder: name it as a source of its own"


def walk(
    root: str, wanted: Callable[[str], bool], unread: Unread, skip: frozenset[str] = frozenset(), out: str = ""
) -> Iterator[tuple[str, str]]:
    """Path and name (below `root`, with /) of every file to read, in no order.

    Links to files are followed, links to folders are not.

    Args:
        wanted: whether a file is read, by its name.
        unread: told of everything else.
        skip: names of folders that are left out and not worth a word.
        out: the folder of the store, which is not read.
    """
    waiting = [(root, "")]
    while waiting:
        folder, below = waiting.pop()
        try:
            with os.scandir(folder) as found:
                entries = list(found)
        except OSError as error:
            if folder == root:
                raise explained(error, f"source {root!r} cannot be listed: {error.strerror}") from error
            long = error.errno == errno.ENAMETOOLONG
            unread.add("the path is too long" if long else f"a folder that cannot be opened: {error.strerror}", folder)
            continue
        for entry in entries:
            if entry.name in skip:
                continue
            why = _why_not(entry, wanted, out)
            if why:
                unread.add(why, entry.path)
            elif entry.is_dir(follow_symlinks=False):
                waiting.append((entry.path, f"{below}{entry.name}/"))
            else:
                yield entry.path, below + entry.name


def special(path: str) -> str:
    """What a path is that is neither a file nor a folder, or ""."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return "a link that leads nowhere" if os.path.islink(path) else ""
        return "the path is too long" if error.errno == errno.ENAMETOOLONG else f"out of reach: {error.strerror}"
    return "" if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "a pipe, socket or device"


def is_store(folder: str) -> bool:
    """Whether a folder holds a token store, finished or not."""
    path = Path(folder)
    return (path / "request.json").is_file() and any((path / name).is_file() for name in ("index.json", "prepare.lock"))


def _why_not(entry: os.DirEntry[str], wanted: Callable[[str], bool], out: str) -> str:
    """Why something in a folder is not read, or ""."""
    if entry.is_dir(follow_symlinks=False):
        if out and entry.name == os.path.basename(out) and os.path.realpath(entry.path) == out:
            return STORE
        if entry.name.startswith("."):
            return HIDDEN
        return STORE if is_store(entry.path) else ""
    if entry.name.startswith("."):
        return HIDDEN
    odd = special(entry.path)
    if odd:
        return odd
    if os.path.isdir(entry.path):
        return LINKED
    if not wanted(entry.name):
        return OTHER_ENDING
    return "" if os.access(entry.path, os.R_OK) else "no right to read it"
