"""Recipes: Python files with `def config() -> Run`, every field of which is also a flag."""

import dataclasses
import importlib.util
import traceback
from collections.abc import Sequence
from pathlib import Path

from meshgpt.config import Run
from meshgpt.errors import UserError


def load(path: Path) -> Run:
    """The `Run` of a recipe, its folder filled in.

    Raises:
      UserError: no such file, or one without a `config()` that returns a `Run`.
    """
    if not path.is_file():
        raise UserError(f"no recipe {path}: name a Python file such as configs/quickstart.py")
    module_spec = importlib.util.spec_from_file_location(f"meshgpt_recipe_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        make = getattr(module, "config", None)
        run = make() if callable(make) else None
    except UserError as error:
        raise UserError(f"{_place(error, path)}: {error}") from error
    except Exception as error:  # the recipe is the user's program: whatever it raises is theirs to mend
        raise UserError(f"{_place(error, path)}: {type(error).__name__}: {error}") from error
    if not isinstance(run, Run):
        raise UserError(f"{path} has no function config() that returns a meshgpt.config.Run")
    return run if run.run_dir else dataclasses.replace(run, run_dir=str(Path("runs") / path.stem))


def _place(error: Exception, path: Path) -> str:
    """`path`, with the last of its lines on the way to `error`."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path.absolute()]
    return f"{path}, line {lines[-1]}" if lines else str(path)


def parse(arguments: Sequence[str], program: str) -> Run:
    """`RECIPE [--flags]` to a Run. Unknown flags and wrong types end the program with exit code 2 and a suggestion."""
    if not arguments or arguments[0].startswith("-"):
        helps = bool(arguments) and arguments[0] in ("-h", "--help")
        text = f"usage: {program} RECIPE [flags]\n\nRECIPE is a Python file such as configs/quickstart.py; "
        text += f"`{program} RECIPE --help` lists its flags."
        if helps:
            print(text)
            raise SystemExit(0)
        raise UserError(f"which recipe?\n{text}")
    import tyro

    default = load(Path(arguments[0]))
    return tyro.cli(
        Run,
        prog=f"{program} {arguments[0]}",
        default=default,
        args=list(arguments[1:]),
        config=(tyro.conf.AvoidSubcommands,),
    )
