"""The one exception for the user's own mistakes, and how a command ends on it."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in what the user asked for, or in a file they named.

    The message names the value, where it came from, and the remedy. The command line prints it and exits with 2.
    """


def exit_code(command: Callable[[], None]) -> int:
    """Runs `command`; 0, or 2 after printing a UserError, or 130 after Ctrl-C, without a traceback."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from what is done", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141  # the reader of our output has gone, as in `meshgpt ... | head`
    return 0
