"""The one exception for the user's own mistakes, and how a command ends on it."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

INTERRUPTED = "interrupted; the same command goes on from what is done"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """A mistake in what the user asked for, or in a file they named.

    The message names the value, where it came from, and the remedy. The command line prints it and exits with 2.
    """


class MachineError(Exception):
    """A fault of the machine and not of the user, in words: `meshgpt launch` starts again where a UserError ends it.

    The command line prints it and exits with 3.
    """


class PortTakenError(MachineError):
    """A port that nobody asked for went to another program before it was listened on: any other will do.

    The command line prints it and exits with 4.
    """


# What a path or a right of the user's makes of an OSError, and a full disk, which no restart empties.
_USERS = {
    *_FULL,
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG),
    *(errno.EEXIST, errno.ELOOP, errno.ENOTEMPTY, errno.EINVAL),
}


def explained(error: OSError, text: str) -> UserError | MachineError:
    """What to raise, with this message, for a file or a connection that failed.

    Returns:
      A UserError where the path, a right or a full disk is at fault. A MachineError for all else: an input or output
      error of a disk, a stale mount, a connection that is refused, reset or timed out; errors of network libraries
      have no number, and are of these too.
    """
    of_a_path = isinstance(
        error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError | FileExistsError
    )
    return UserError(text) if of_a_path or error.errno in _USERS else MachineError(text)


def exit_code(command: Callable[[], None]) -> int:
    """Runs `command`: 0; without a traceback 2 on a UserError, 3 or 4 on a MachineError, 130 on Ctrl-C or SIGTERM."""
    try:
        with _sigterm_as_ctrl_c():
            command()
        sys.stdout.flush()
    except UserError as error:
        return _told(f"error: {error}", 2)
    except MachineError as error:
        return _told(f"error: {error}", 4 if isinstance(error, PortTakenError) else 3)
    except KeyboardInterrupt:
        return _told(f"\n{INTERRUPTED}", 130)
    except BrokenPipeError:
        # The reader of our output has gone, as in `meshgpt ... | head`; Python's own last flush must not say so again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in _FULL:
            raise
        return _told(f"error: cannot write {error.filename or 'the output'}: the disk is full", 2)
    return 0


def _told(text: str, code: int) -> int:
    with suppress(OSError):
        print(text, file=sys.stderr)
    flush_output()
    return code


def flush_output() -> None:
    """Writes out what is held back, and drops it where the disk is full: that must not change an exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Lets SIGTERM unwind the program as Ctrl-C does, so that what is under way is put away in order."""

    def interrupt(number: int, frame: object) -> None:
        del number, frame
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
