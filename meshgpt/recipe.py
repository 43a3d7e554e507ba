"""Recipes: Python files with `def config() -> Run`, or other functions, every field of which is also a flag."""

import argparse
import dataclasses
import importlib.util
import traceback
from collections.abc import Sequence
from pathlib import Path

from meshgpt.config import Run
from meshgpt.errors import UserError
from meshgpt.smoke import smoke


def load(path: Path, name: str = "config", small: bool = False) -> Run:
    """The `Run` that a recipe's function `name` returns, its folder filled in.

    `small`: at its smoke size, which the recipe's own function smoke() returns, or `smoke.smoke` makes.

    Raises:
      UserError: no such file, or one without such a function that returns a `Run`.
    """
    if not path.is_file():
        raise UserError(f"no recipe {path}: name a Python file such as configs/quickstart.py")
    module_spec = importlib.util.spec_from_file_location(f"meshgpt_recipe_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        own = small and name == "config" and hasattr(module, "smoke")
        make = getattr(module, "smoke" if own else name, None)
        run = make() if callable(make) else None
        run = smoke(run) if small and not own and isinstance(run, Run) else run
    except UserError as error:
        raise UserError(f"{_place(error, path)}: {error}") from error
    except Exception as error:  # the recipe is the user's program: whatever it raises is theirs to mend
        raise UserError(f"{_place(error, path)}: {type(error).__name__}: {error}") from error
    if not isinstance(run, Run):
        raise UserError(f"{path} has no function {name}() that returns a meshgpt.config.Run")
    folder = f"{path.stem}-smoke" if small else path.stem
    return run if run.run_dir else dataclasses.replace(run, run_dir=str(Path("runs") / folder))


def _place(error: Exception, path: Path) -> str:
    """`path`, with the last of its lines on the way to `error`."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path.absolute()]
    return f"{path}, line {lines[-1]}" if lines else str(path)


def take_flags(
    parser: argparse.ArgumentParser, arguments: Sequence[str], usage: str
) -> tuple[argparse.Namespace, list[str]]:
    """(a verb's own flags, the recipe and its flags) of what stands behind the verb; `parser` must not exit on errors.

    Raises:
      UserError: the mistake, and the usage.
    """
    try:
        return parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise UserError(f"{error}\n{usage}") from error


def parse(arguments: Sequence[str], program: str) -> Run:
    """`RECIPE[:FUNCTION] [--smoke] [--flags]` to a Run.

    Unknown flags and wrong types end the program with exit code 2 and a suggestion.
    """
    if not arguments or arguments[0].startswith("-"):
        helps = bool(arguments) and arguments[0] in ("-h", "--help")
        text = f"""usage: {program} RECIPE[:FUNCTION] [--smoke] [flags]

RECIPE is a Python file such as configs/quickstart.py, whose function config(), or the one named, returns the run;
`{program} RECIPE --help` lists its flags. --smoke takes the recipe at a size that a CPU trains in a minute, on text
that every machine has."""
        if helps:
            print(text)
            raise SystemExit(0)
        raise UserError(f"which recipe?\n{text}")
    import tyro

    path, colon, name = arguments[0].rpartition(":")
    if not colon:
        path, name = arguments[0], "config"
    flags = [flag for flag in arguments[1:] if flag != "--smoke"]
    default = load(Path(path), name, small="--smoke" in arguments)
    return tyro.cli(
        Run,
        prog=f"{program} {arguments[0]}",
        default=default,
        args=flags,
        config=(tyro.conf.AvoidSubcommands,),
    )
