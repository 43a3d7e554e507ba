"""`meshgpt VERB ...`: one verb each, imported only when it is asked for."""

import sys
from collections.abc import Callable, Sequence

import meshgpt
from meshgpt.errors import UserError, exit_code


def _train(arguments: Sequence[str]) -> None:
    from meshgpt import train

    raise SystemExit(train.main(arguments, "meshgpt train"))


def _launch(arguments: Sequence[str]) -> None:
    from meshgpt.cli.launch import launch

    raise SystemExit(launch(arguments))


def _chaos(arguments: Sequence[str]) -> None:
    from meshgpt.cli.chaos import chaos

    raise SystemExit(chaos(arguments))


def _prepare(arguments: Sequence[str]) -> None:
    from meshgpt.cli.models import prepare

    prepare(arguments)


def _generate(arguments: Sequence[str]) -> None:
    from meshgpt.cli.models import generate

    generate(arguments)


def _export(arguments: Sequence[str]) -> None:
    from meshgpt.cli.models import export

    export(arguments)


def _quantize(arguments: Sequence[str]) -> None:
    from meshgpt.cli.quantize import quantize

    quantize(arguments)


def _report(arguments: Sequence[str]) -> None:
    from meshgpt.cli.report import report

    report(arguments)


def _eval(arguments: Sequence[str]) -> None:
    from meshgpt.cli.eval import main

    raise SystemExit(main(arguments))


def _plan(arguments: Sequence[str]) -> None:
    from meshgpt.cli.plan import plan

    plan(arguments)


def _data(arguments: Sequence[str]) -> None:
    from meshgpt.cli.data import data

    data(arguments)


def _compile(arguments: Sequence[str]) -> None:
    from meshgpt.cli.compile import compile_recipe

    compile_recipe(arguments)


def _import(arguments: Sequence[str]) -> None:
    from meshgpt.cli.models import import_weights

    import_weights(arguments)


def _sweep(arguments: Sequence[str]) -> None:
    from meshgpt.cli.sweep import sweep

    sweep(arguments)


def _doctor(arguments: Sequence[str]) -> None:
    if arguments:
        raise UserError(f"meshgpt doctor takes no arguments, and got {arguments[0]!r}")
    from meshgpt.cli.doctor import examine

    print(examine())


VERBS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "train": (_train, "RECIPE: train a model, or go on with a run"),
    "launch": (_launch, "--processes N RECIPE: the same with N processes, watched and restarted"),
    "chaos": (_chaos, "RECIPE --kills N: kill, stop, damage, fill the disk; the run must end as it would have"),
    "data": (_data, "order|show|find|inspect|pack: what a run saw, and what a store holds"),
    "prepare": (_prepare, "SOURCE... --out DIR: text to a token store"),
    "generate": (_generate, "RUN|FOLDER --prompt TEXT: text from a trained model"),
    "import": (_import, "SOURCE --out DIR: weights of Hugging Face's or Mesh-Transformer-JAX's"),
    "export": (_export, "RUN --out DIR: a Hugging Face folder, proved by reading it back"),
    "quantize": (_quantize, "RUN|FOLDER --format nf4 --out DIR: 4 or 8 bits, for bitsandbytes and llama.cpp"),
    "report": (_report, "RUN...: model card, plots and a page of a run; several runs beside each other"),
    "eval": (_eval, "RUN|FOLDER --tasks NAMES: tasks of the lm-evaluation-harness, perplexity, multiple choice"),
    "plan": (
        _plan,
        "budget|memory|fit: what a budget buys, what a run takes of a device, what runs say of the next",
    ),
    "sweep": (_sweep, "RECIPE --optim.peak-lr 1e-4:1e-2:log:5 --global-batch 32,64: which numbers are best"),
    "compile": (_compile, "RECIPE --topology v3-256: will it fit and how fast, for a pod nobody has rented yet"),
    "doctor": (_doctor, "what this machine has: devices, memory, versions"),
}


def usage() -> str:
    lines = [f"meshgpt {meshgpt.__version__}: train GPT-2 and GPT-J on CPU, GPU and TPU", "", "usage: meshgpt VERB ..."]
    lines += [f"  {verb:<9} {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join([*lines, "", "`meshgpt VERB --help` says more of each; `meshgpt --version` the version."])


def main(arguments: Sequence[str] | None = None) -> int:
    """The console command; gives the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments

    def command() -> None:
        verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
        if verb in ("-h", "--help"):
            print(usage())
        elif verb == "--version":
            print(f"meshgpt {meshgpt.__version__}")
        elif verb in VERBS:
            VERBS[verb][0](rest)
        else:
            raise UserError(f"no verb {verb!r}{_nearest(verb)}\n{usage()}")

    return exit_code(command)


def _nearest(verb: str) -> str:
    import difflib

    near = difflib.get_close_matches(verb, VERBS, n=1)
    return f"; perhaps you meant {near[0]!r}" if near else ""
