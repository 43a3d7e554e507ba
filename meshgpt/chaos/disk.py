"""A disk that can be full without harm to the user's own.

Where a tmpfs can be mounted (as root), the disturbed run lies on one, and a file that takes all that is left makes
every write fail with ENOSPC. Elsewhere the processes get a limit on the size of their files from outside (prlimit(2),
RLIMIT_FSIZE): their next write beyond it fails with EFBIG, as a quota's would with EDQUOT.
"""

import errno
import resource
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_BLOCK = bytes(1 << 16)
_LIMIT_BYTES = 4096


class Disk:
    """The folder `path`; `mounted` says whether it is a file system of its own."""

    def __init__(self, path: Path, mounted: bool) -> None:
        self.path, self.mounted = path, mounted
        self._filler = path / "filler"

    def fill(self, pids: Sequence[int]) -> None:
        """From now on the processes `pids` cannot write there."""
        if not self.mounted:
            for pid in pids:
                hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (_LIMIT_BYTES, hard))
            return
        try:
            with open(self._filler, "ab", buffering=0) as file:
                while True:
                    file.write(_BLOCK)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise

    def free(self) -> None:
        """There is room again, for processes that start now."""
        self._filler.unlink(missing_ok=True)


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[Disk]:
    """A disk of `size` bytes at `path`, gone afterwards; or just the folder, where nothing can be mounted."""
    path.mkdir(parents=True)
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield Disk(path, mounted)
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(path)], check=False)
