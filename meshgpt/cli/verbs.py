"""`meshgpt VERB ...`: one verb each, imported only when it is asked for."""

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import meshgpt
from meshgpt.errors import UserError, exit_code


class Verb(NamedTuple):
    """A verb, named without importing it.

    Attributes:
      function: MODULE:NAME of what takes the words behind the verb, and gives None or an exit code.
      summary: what stands behind the verb, and what it does.
      settings: MODULE:NAME of the dataclass of its flags; "" where it has none of its own.
    """

    function: str
    summary: str
    settings: str = ""


VERBS = {
    "train": Verb("meshgpt.train:verb", "RECIPE: train a model, or go on with a run", "meshgpt.config:Run"),
    "launch": Verb(
        "meshgpt.cli.launch:launch",
        "--processes N RECIPE: the same with N processes, watched and restarted",
        "meshgpt.cli.launch:Arguments",
    ),
    "chaos": Verb(
        "meshgpt.cli.chaos:chaos",
        "RECIPE --kills N: kill, stop, damage, fill the disk; the run must end as it would have",
        "meshgpt.cli.chaos:Arguments",
    ),
    "data": Verb("meshgpt.cli.verbs:data", "order|show|find|inspect|pack: what a run saw, and what a store holds"),
    "prepare": Verb(
        "meshgpt.cli.models:prepare", "SOURCE... --out DIR: text to a token store", "meshgpt.data.prepare:Prepare"
    ),
    "generate": Verb(
        "meshgpt.cli.models:generate",
        "RUN|FOLDER --prompt TEXT: text from a trained model",
        "meshgpt.cli.models:GenerateArguments",
    ),
    "import": Verb(
        "meshgpt.cli.models:import_weights",
        "SOURCE --out DIR: weights of Hugging Face's or Mesh-Transformer-JAX's",
        "meshgpt.cli.models:ImportArguments",
    ),
    "export": Verb(
        "meshgpt.cli.models:export",
        "RUN --out DIR: a Hugging Face folder, proved by reading it back",
        "meshgpt.cli.models:ExportArguments",
    ),
    "quantize": Verb(
        "meshgpt.cli.quantize:quantize",
        "RUN|FOLDER --format nf4 --out DIR: 4 or 8 bits, for bitsandbytes and llama.cpp",
        "meshgpt.cli.quantize:Arguments",
    ),
    "report": Verb(
        "meshgpt.cli.report:report",
        "RUN...: model card, plots and a page of a run; several runs beside each other",
        "meshgpt.cli.report:Arguments",
    ),
    "eval": Verb(
        "meshgpt.cli.eval:main",
        "RUN|FOLDER --tasks NAMES: tasks of the lm-evaluation-harness, perplexity, multiple choice",
        "meshgpt.cli.eval:Arguments",
    ),
    "plan": Verb(
        "meshgpt.cli.verbs:plan", "budget|memory|fit: what a budget buys, what a device holds, what your runs say"
    ),
    "sweep": Verb(
        "meshgpt.cli.sweep:sweep",
        "RECIPE --optim.peak-lr 1e-4:1e-2:log:5 --global-batch 32,64: which numbers are best",
        "meshgpt.cli.sweep:Arguments",
    ),
    "compile": Verb(
        "meshgpt.cli.compile:compile_recipe",
        "RECIPE --topology v3-256: will it fit and how fast, for a pod nobody has rented yet",
        "meshgpt.cli.compile:Arguments",
    ),
    "doctor": Verb("meshgpt.cli.doctor:doctor", "what this machine has: devices, memory, versions"),
}

PLANS = {
    "budget": Verb(
        "meshgpt.planning.budget:command",
        "--flops|--hours|--tokens: size, tokens, loss, hours and cost by three published laws",
        "meshgpt.planning.budget:Budget",
    ),
    "memory": Verb(
        "meshgpt.planning.memory:command",
        "RECIPE [--topology NAME]: what it takes of a device, and what would make it fit",
        "meshgpt.planning.memory:Arguments",
    ),
    "fit": Verb(
        "meshgpt.planning.fit:command",
        "RUN...: a law fitted to your runs, and what it predicts of others",
        "meshgpt.planning.fit:Arguments",
    ),
}

DATA = {
    "order": Verb(
        "meshgpt.cli.data:order",
        "RUN --from-step A --to-step B: digests of what each step sees",
        "meshgpt.cli.data:OrderArguments",
    ),
    "show": Verb(
        "meshgpt.cli.data:show",
        "RUN --step N: the text of a step's batch, with its documents",
        "meshgpt.cli.data:ShowArguments",
    ),
    "find": Verb(
        "meshgpt.cli.data:find",
        "STORE|RUN TEXT: documents with a text, and the steps that see it",
        "meshgpt.cli.data:FindArguments",
    ),
    "inspect": Verb(
        "meshgpt.cli.data:inspect",
        "STORE: documents, tokens, lengths, common tokens, samples",
        "meshgpt.cli.data:InspectArguments",
    ),
    "pack": Verb(
        "meshgpt.cli.data:pack", "STORE --seq-len N: whole documents side by side", "meshgpt.cli.data:PackArguments"
    ),
}


def named(place: str) -> Any:
    """What MODULE:NAME names, imported."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def plan(arguments: Sequence[str]) -> int | None:
    """meshgpt plan WHAT ..."""
    return dispatch("meshgpt plan", PLANS, arguments)


def data(arguments: Sequence[str]) -> int | None:
    """meshgpt data WHAT ..."""
    return dispatch("meshgpt data", DATA, arguments)


def dispatch(program: str, verbs: Mapping[str, Verb], arguments: Sequence[str], opening: str = "") -> int | None:
    """Runs the verb that the first word names, and gives its exit code; prints the verbs on --help or no word.

    Raises:
      UserError: no such verb.
    """
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if verb in verbs:
        return named(verbs[verb].function)(rest)
    lines = [f"{opening}usage: {program} VERB ..."]
    lines += [f"  {name:<9} {one.summary}" for name, one in verbs.items()]
    text = "\n".join([*lines, "", f"`{program} VERB --help` says more of each."])
    if verb in ("-h", "--help"):
        print(text)
        return None
    called = " ".join([*program.split()[1:], verb])
    raise UserError(f"no verb {called!r}{_nearest(verb, verbs)}\n{text}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The console command; gives the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    version = f"meshgpt {meshgpt.__version__}"

    def command() -> None:
        if list(arguments[:1]) == ["--version"]:
            print(version)
        else:
            code = dispatch("meshgpt", VERBS, arguments, f"{version}: train GPT-2 and GPT-J on CPU, GPU and TPU\n\n")
            if code is not None:
                raise SystemExit(code)

    return exit_code(command)


def _nearest(verb: str, verbs: Mapping[str, Verb]) -> str:
    import difflib

    near = difflib.get_close_matches(verb, verbs, n=1)
    return f"; perhaps you meant {near[0]!r}" if near else ""
