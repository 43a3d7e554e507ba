"""What the tests of evaluation share: exported models with random weights, and tasks of the harness on local data."""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import lm_eval
import lm_eval.tasks
import numpy as np
import pytest
import tiny

from meshgpt import convert
from meshgpt.data.tokenizer import ByteLevelBPE, train_bpe
from meshgpt.evals.scoring import Scorer
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.gptj import GPTJConfig
from meshgpt.models.model import ModelConfig
from meshgpt.models.precision import Precision
from meshgpt.training import finish
from meshgpt.training.load import Trained, open_trained

TASKS = Path(lm_eval.__file__).parent / "tasks"
CONTEXT = 64
_SHAPE = {"vocab_size": 400, "n_positions": CONTEXT, "n_layers": 2, "n_heads": 4, "d_model": 32, "vocab_multiple": 64}
GPT2 = GPT2Config(**_SHAPE)
GPTJ = GPTJConfig(**_SHAPE, rotary_dim=4)

_TEXT = """the a one this some every small old red quiet river stone bird house garden letter teacher child engine road
runs sings falls opens carries finds breaks answers waits turns under over beside without after near slowly again never
twice Paris 1912 12% é naïve"""


@contextmanager
def quick_to_compile() -> Iterator[None]:
    """Programs that run once, and need not be fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def only_local_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`harness.open_tasks` without the harness's own 14,000, whose files take seconds to read."""
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    )


def silent(label: str, done: int, total: int | None) -> None:
    del label, done, total


def sentence(seed: int, words: int) -> str:
    """Text of so many words that no two seeds share."""
    drawn = np.random.default_rng(seed).choice(_TEXT.split(), words)
    return " ".join(drawn.tolist()).capitalize() + "."


@functools.cache
def tokenizer() -> ByteLevelBPE:
    return train_bpe([sentence(seed, 20) for seed in range(200)], _SHAPE["vocab_size"])


def export(config: ModelConfig, folder: Path) -> Path:
    """Random weights as a Hugging Face folder that our export wrote."""
    with jax.set_mesh(tiny.mesh()):
        model = tiny.model(config, precision=Precision(compute="float32"))
        params = tiny.params(config, tiny.numpy_params(config, scale=0.2))
        probe = finish.probe(model, np.arange(CONTEXT))
        convert.export(params, config, tokenizer(), folder, probe=probe)
    return folder


@contextmanager
def opened(folder: Path, mesh: jax.sharding.Mesh, batch_size: int = 0) -> Iterator[tuple[Scorer, Trained]]:
    """The model of a folder in float32, on a mesh that is set, and what scores with it."""
    with jax.set_mesh(mesh):
        trained = open_trained(folder, Precision(compute="float32"), print)
        yield Scorer(trained.model, trained.params, mesh, batch_size), trained


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def hellaswag_rows(count: int) -> list[dict[str, Any]]:
    """Rows in the form of Rowan/hellaswag, with the marks that its cleaning removes."""

    def row(number: int) -> dict[str, Any]:
        endings = [f"{sentence(1000 + 10 * number + i, 3 + i)} [substeps] end" for i in range(4)]
        first, second = sentence(number, 5 + number % 40), "[header] the next [title] thing"
        both = {"ctx_a": first, "ctx_b": second, "ctx": f"{first} {second}"}
        return {"activity_label": "Walking", **both, "endings": endings, "label": str(number % 4)}

    return [row(number) for number in range(count)]


def plain_rows(count: int) -> list[dict[str, Any]]:
    """Rows with HellaSwag's fields but no marks of its own; endings of very different lengths."""
    return [
        {
            "ctx": sentence(30000 + number, 4 + number % 9),
            "endings": [sentence(31000 + 10 * number + i, 1 + 3 * ((i + number) % 4)) for i in range(4)],
            "label": number % 3,
        }
        for number in range(count)
    ]


# How the harness puts such rows as they are.
PLAIN = {"process_docs": None, "doc_to_text": "{{ctx}}", "doc_to_target": "{{label}}", "doc_to_choice": "{{endings}}"}


def sciq_rows(count: int) -> list[dict[str, Any]]:
    """Rows in the form of allenai/sciq."""
    return [
        {
            "question": sentence(5000 + number, 6),
            "support": sentence(6000 + number, number % 30 + 1) if number % 3 else "",
            "correct_answer": sentence(7000 + number, 1),
            **{f"distractor{i}": sentence(8000 + 10 * number + i, i) for i in (1, 2, 3)},
        }
        for number in range(count)
    ]


def wikitext_rows(count: int) -> list[dict[str, Any]]:
    """Pages in the form of EleutherAI/wikitext_document_level; some longer than the context."""

    def page(number: int) -> str:
        text = " ".join(sentence(9000 + 100 * number + i, 9) for i in range(1 + 3 * number))
        return f" = Page {number} = \n\n {text.replace('.', ' .')} 12 @,@ 000 @-@ odd ( words ) . \n"

    return [{"page": page(number)} for number in range(count)]


def lambada_rows(count: int) -> list[dict[str, Any]]:
    """Rows in the form of EleutherAI/lambada_openai."""
    return [{"text": sentence(20000 + number, 12 + number)} for number in range(count)]


def local_task(folder: Path, name: str, base: str, split: str, rows: list[dict[str, Any]], **settings: Any) -> None:
    """The harness's own task `base` (a YAML file of it) under another name, on rows that lie here."""
    data = write_lines(folder / f"{name}.jsonl", rows)
    text = {
        "include": str(TASKS / base),
        "task": name,
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(data)}, "cache_dir": str(folder / "cache")},
        **{f"{other}_split": None for other in ("training", "validation", "test", "fewshot")},
        f"{split}_split": split,
        **settings,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(text), encoding="utf-8")  # JSON is YAML


def make_tasks(folder: Path) -> Path:
    folder.mkdir(parents=True)
    local_task(folder, "local_hellaswag", "hellaswag/hellaswag.yaml", "validation", hellaswag_rows(24))
    local_task(folder, "local_sciq", "sciq/sciq.yaml", "validation", sciq_rows(24))
    local_task(folder, "local_wikitext", "wikitext/wikitext.yaml", "test", wikitext_rows(4))
    local_task(folder, "local_plain", "hellaswag/hellaswag.yaml", "validation", plain_rows(24), **PLAIN)
    local_task(folder, "local_lambada", "lambada/lambada_openai.yaml", "test", lambada_rows(24))
    return folder
