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


class MachineError(Exception):
    """A fault of the machine and not of the user, in words: `meshgpt launch` starts again where a UserError ends it.

    The command line prints it and exits with 3.
    """


def exit_code(command: Callable[[], None]) -> int:
    """Runs `command`: 0, or without a traceback 2 on a UserError, 3 on a MachineError, 130 on Ctrl-C or SIGTERM."""
    try:
        with _sigterm_as_ctrl_c():
            command()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MachineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
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
