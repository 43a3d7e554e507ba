"""`python -m meshgpt.train RECIPE [--flags]`, the same as `meshgpt train`: trains a model, or goes on with a run."""

import shlex
import sys
from collections.abc import Sequence

from meshgpt import recipe, runtime
from meshgpt.config import differences, to_json
from meshgpt.distributed import processes
from meshgpt.errors import exit_code
from meshgpt.training.loop import print_line, train


def main(arguments: Sequence[str] | None = None, program: str = "python -m meshgpt.train") -> int:
    """The command; gives the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments

    def command() -> None:
        flags, rest = processes.take_flags(arguments)
        run = recipe.parse(rest, program, processes.HELP)
        runtime.start()
        runtime.keep_freed_memory()
        with processes.joined(processes.placement(flags), print_line):
            processes.check_agreement(to_json(run), differences)
            train(run, f"{program} {shlex.join(rest)}")

    return processes.leave(exit_code(command))


def verb(arguments: Sequence[str]) -> int:
    """meshgpt train RECIPE; gives the exit code."""
    return main(arguments, "meshgpt train")


if __name__ == "__main__":
    sys.exit(main())
