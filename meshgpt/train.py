"""`python -m meshgpt.train RECIPE [--flags]`, the same as `meshgpt train`: trains a model, or goes on with a run.

In Python `meshgpt.train(run)` is `meshgpt.api.train`: the module can be called, since it has the function's name.
"""

import shlex
import sys
import types
from collections.abc import Sequence

from meshgpt import api, recipe, runtime
from meshgpt.config import Run, differences, to_json
from meshgpt.distributed import processes
from meshgpt.errors import exit_code
from meshgpt.training.callbacks import Callback
from meshgpt.training.loop import print_line, train


def main(arguments: Sequence[str] | None = None, program: str = "python -m meshgpt.train") -> int:
    """The command; gives the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments

    def command() -> None:
        flags, rest = processes.take_flags(arguments)
        run = recipe.parse(rest, program, processes.HELP)
        runtime.start()
        runtime.keep_freed_memory()
        with processes.distributed_session(processes.process_spec(flags), print_line):
            processes.check_agreement(to_json(run), differences)
            train(run, f"{program} {shlex.join(rest)}")

    return processes.leave(exit_code(command))


def verb(arguments: Sequence[str]) -> int:
    """meshgpt train RECIPE; gives the exit code."""
    return main(arguments, "meshgpt train")


class _Callable(types.ModuleType):
    def __call__(self, run: Run, callbacks: Sequence[Callback] = ()) -> api.TrainedRun:
        return api.train(run, callbacks)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(main())
