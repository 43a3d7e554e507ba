"""Recipes: Python files with `def config() -> Run`, or other functions, every field of which is also a flag."""

import dataclasses
import importlib.util
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from meshgpt import flags
from meshgpt.config import Run
from meshgpt.errors import UserError
from meshgpt.smoke import smoke

_T = TypeVar("_T")


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


def take(cls: type[_T], arguments: Sequence[str], program: str) -> tuple[_T, list[str]]:
    """(a verb's own settings, the recipe and its flags) of what stands behind the verb, in any order.

    Ends the program on --help where no recipe is named, and on a mistake.
    """
    own, rest = flags.split(cls, arguments)
    if not arguments or rest[:1] in (["-h"], ["--help"]):
        own = ["--help"]
    return flags.parse(cls, own, f"{program} RECIPE"), recipe_first(rest)


def recipe_first(words: Sequence[str]) -> list[str]:
    """`words` with the recipe before its flags: it is the first of them, or else the only one that ends as recipes do.

    Raises:
      UserError: several could be the recipe.
    """
    if not words or not words[0].startswith("-"):
        return list(words)
    places = [index for index, word in enumerate(words) if re.fullmatch(r"[^-].*\.py(:\w+)?", word)]
    if len(places) > 1:
        raise UserError(
            f"which is the recipe, {' or '.join(words[index] for index in places)}? Put it before the flags"
        )
    return [*(words[index] for index in places), *(word for index, word in enumerate(words) if index not in places)]


def parse(arguments: Sequence[str], program: str, more_help: str = "") -> Run:
    """`RECIPE[:FUNCTION] [--smoke] [--flags]` to a Run.

    Unknown flags and wrong types end the program with exit code 2 and a suggestion. `more_help`: what --help says
    besides.
    """
    arguments = recipe_first(arguments)
    if not arguments or arguments[0].startswith("-"):
        helps = bool(arguments) and arguments[0] in ("-h", "--help")
        text = f"""usage: {program} RECIPE[:FUNCTION] [--smoke] [flags]

RECIPE is a Python file such as configs/quickstart.py, whose function config(), or the one named, returns the run;
`{program} RECIPE --help` lists its flags. --smoke takes the recipe at a size that a CPU trains in a minute, on text
that every machine has."""
        if helps:
            print("\n\n".join(filter(None, [text, more_help])))
            raise SystemExit(0)
        raise UserError(f"which recipe?\n{text}")
    path, colon, name = arguments[0].rpartition(":")
    if not colon:
        path, name = arguments[0], "config"
    words = [word for word in arguments[1:] if word != "--smoke"]
    default = load(Path(path), name, small="--smoke" in arguments)
    return flags.parse(Run, words, f"{program} {arguments[0]}", default=default, more=more_help)
