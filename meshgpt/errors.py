"""The one exception for the user's own mistakes, which the command line prints without a traceback."""


class UserError(Exception):
    """A mistake in what the user asked for, or in a file they named.

    The message names the value, where it came from, and the remedy. The command line prints it and exits with 2.
    """
