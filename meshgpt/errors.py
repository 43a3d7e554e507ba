"""The one exception for the user's own mistakes, and how a command ends on it."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in what the user asked for, or in a file they named.

    The message names the value, where it came from, and the remedy. The command line prints it and exits with 2.
    """


def exit_code(command: Callable[[], None]) -> int:
    """Runs `command`; 0, or 2 after printing a UserError, or 130 after Ctrl-C or SIGTERM, without a traceback."""
    try:
        with _sigterm_as_ctrl_c():
            command()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from what is done", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone, as in `meshgpt ... | head`; Python's own last flush must not say so again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


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
