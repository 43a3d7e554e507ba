"""A ladder of six small GPT-2s: a scaling law fitted to five of them predicts the sixth.

    python configs/ladder.py
    meshgpt plan fit runs/ladder/n{1..5} --predict runs/ladder/n6 --plot ladder.png

Hardware: any; two busy CPU cores take twelve minutes. No download: the text is the prose in Python's standard library,
its docstrings and the language reference that `help()` prints. The learning rate stays constant, so that every
evaluation is a point of the law. Result: docs/scaling.md.
"""

import ast
import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

from meshgpt.checkpoint.manager import Checkpointing
from meshgpt.config import Data, Run, Samples
from meshgpt.data.prepare import Prepare
from meshgpt.models.layers import Execution
from meshgpt.models.model import GPT2Config
from meshgpt.optim.config import AdamW, Constant

FOLDER = Path("runs/ladder")
VOCABULARY = 1024
WIDTHS = (16, 24, 32, 48, 64, 96)
_SHORTEST = 200  # characters of a docstring worth keeping


def rung(number: int) -> Run:
    """The run of one size, 1 to 6. All see the same tokens in the same order."""
    width = WIDTHS[number - 1]
    return Run(
        model=GPT2Config(vocab_size=VOCABULARY, n_positions=128, n_layers=2, n_heads=width // 8, d_model=width),
        data=Data(
            prepare=Prepare(
                sources=(str(FOLDER / "text"),),
                out=str(FOLDER / "data"),
                train_tokenizer="bpe",
                vocab_size=VOCABULARY,
                val_fraction=0.05,
            )
        ),
        steps=800,
        global_batch=8,
        optim=AdamW(peak_lr=0.02 / width**0.5, warmup_steps=40, schedule=Constant()),
        execution=Execution(unroll=0),
        eval_every=40,
        eval_batches=24,
        log_every=25,
        checkpointing=Checkpointing(every=400),
        samples=Samples(prompts=()),
        export="none",
        run_dir=str(FOLDER / f"n{number}"),
    )


def config() -> Run:
    return rung(1)


def write_prose(folder: Path) -> None:
    """One text file a module: its docstrings, as they stand; and the topics of `help()`."""
    folder.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"} & set(name.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # lib2to3 keeps some broken files on purpose
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        kept = [text for text in texts if len(text) >= _SHORTEST]
        if kept:
            (folder / f"{'.'.join(name.with_suffix('').parts)}.txt").write_text("\n\n".join(kept), encoding="utf-8")
    for topic, text in topics.items():
        (folder / f"topic-{topic.replace('/', '-')}.txt").write_text(text, encoding="utf-8")


def main() -> int:
    """Trains the six, one after the other; run again, it goes on where it stopped."""
    from meshgpt import runtime
    from meshgpt.errors import exit_code
    from meshgpt.train import train
    from meshgpt.training.run_folder import RunFolder

    def command() -> None:
        write_prose(FOLDER / "text")
        runtime.start()
        for run in map(rung, range(1, len(WIDTHS) + 1)):
            train(run, "python configs/ladder.py")
            if RunFolder(Path(run.run_dir)).finished_step() != run.steps:
                return  # asked to stop, and saved

    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main())
