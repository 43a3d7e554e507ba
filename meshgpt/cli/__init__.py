"""`meshgpt VERB ...`: the command line, one module a verb, each imported only when its verb is asked for."""

from meshgpt.cli.verbs import main

__all__ = ["main"]
