"""`meshgpt quantize`: a model in 4 or 8 bits for other tools, and what that costs in quality."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, cast

import jax
import numpy as np
import tyro

import meshgpt
from meshgpt import convert, flags, runtime
from meshgpt.data.store import Store
from meshgpt.data.tokenizer import Tokenizer, load_tokenizer
from meshgpt.distributed.mesh import MeshShape, make_mesh
from meshgpt.errors import UserError
from meshgpt.evals import choices, files, perplexity
from meshgpt.evals.intervals import Part
from meshgpt.evals.scoring import Progress, Scorer
from meshgpt.models.model import Model, ModelConfig, parameter_shapes
from meshgpt.models.precision import Precision
from meshgpt.report.blocks import Block, Code, Heading, Table, Text, to_markdown
from meshgpt.report.front_matter import front_matter_of
from meshgpt.settings import settings
from meshgpt.training.load import open_trained
from meshgpt.training.pretrained import RECORD, hub_id
from meshgpt.training.run_folder import RunFolder
from meshgpt.training.trackers import progress_bar
from meshgpt.trees import Tree

Format: TypeAlias = Literal[
    "nf4", "fp4", "int8",
    "gguf-f32", "gguf-f16", "gguf-bf16", "gguf-q8_0", "gguf-q5_1", "gguf-q5_0", "gguf-q4_1", "gguf-q4_0",
]  # fmt: skip

_HELD_OUT_TOKENS = 100_000  # of a run's own held-out text


@settings()
class Arguments:
    """A model in fewer bits, for other tools: bitsandbytes' formats (transformers), or GGUF (llama.cpp).

    For example: meshgpt quantize runs/a --format nf4 --double-quant --out a-nf4
                 meshgpt quantize gpt2 --format gguf-q8_0 --out a-gguf --eval-text held_out.txt

    The matrices of the blocks are quantized; embeddings, heads, norms and biases are not (in GGUF, tables are: see
    docs/huggingface.md). A folder or a model of the hub streams through: the host holds a tensor at a time.
    """

    source: Annotated[str, tyro.conf.Positional]
    """A run's folder, an imported one, a Hugging Face folder or a hub id (owner/name)."""
    format: Format
    """What to write: `nf4` and `fp4` take 4 bits a weight in blocks of 64, `int8` rows of 8 bits, and `gguf-...` make a
    file for llama.cpp and Ollama, of GPT-J under the name of Phi (the same model)."""
    out: Path
    """Folder to write."""
    double_quant: bool = False
    """Keep the scales of nf4 and fp4 in 8 bits too, for 4.1 bits a weight instead of 4.5."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Dtype of what is not quantized, and what transformers computes in; GGUF has none."""
    eval_text: tuple[Path, ...] = ()
    """Texts (.txt, or .jsonl with a field `text`) whose perplexity is measured before and after; of a run, none given
    takes the first 100,000 tokens of its own held-out text."""
    eval_choices: tuple[Path, ...] = ()
    """Multiple-choice files in HellaSwag's form, whose accuracy is measured before and after."""
    step: int | None = None
    """Step of the checkpoint to take, of a run; None takes the newest."""
    mesh: MeshShape = MeshShape()
    """How devices are arranged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A model to be quantized. contents: its tensors, one at a time. load: its parameters for a model, on the mesh."""

    config: ModelConfig
    tokenizer: Tokenizer | None
    contents: Callable[[], convert.Contents]
    load: Callable[[Model], Tree]
    texts: dict[str, list[str]]  # its own held-out text


def quantize(arguments: Sequence[str]) -> None:
    """meshgpt quantize RUN|FOLDER --format nf4 --out DIR"""
    asked = flags.parse(Arguments, arguments, "meshgpt quantize")
    form = _form(asked)
    texts = {files.stem(path): files.read_texts(path, "text") for path in asked.eval_text}
    questions = {files.stem(path): choices.read_questions(files.read_json_lines(path)) for path in asked.eval_choices}
    runtime.start()
    mesh = make_mesh(asked.mesh)
    with jax.set_mesh(mesh), progress_bar() as report:
        opened = open_for_quantizing(asked.source, asked.step)
        model = Model(config=opened.config, precision=Precision())
        measure = functools.partial(_measure, model, opened.tokenizer, mesh, texts or opened.texts, questions, report)
        form.check(opened.config, opened.tokenizer)
        if opened.tokenizer is None and (texts or questions):
            raise UserError(
                f"{asked.source} has no tokenizer, which --eval-text and --eval-choices need: copy the model's "
                "tokenizer.json into it, or leave them out"
            )
        note = form.note(opened.config) if isinstance(form, convert.GgufForm) else ""
        note = convert.NO_TOKENIZER if opened.tokenizer is None else note
        before = measure(opened.load(model)) if texts or questions or opened.texts else {}

        def finish(folder: Path) -> None:
            after = measure(form.load(folder, opened.config, model.abstract_params())) if before else {}
            table = quality_table(before, after, _bytes_before(opened.config), sum(_sizes(folder)))
            text = front_matter_of(_front(asked)) + to_markdown(_card(asked, note, table), "")
            (folder / "README.md").write_text(text, encoding="utf-8")
            print("\n".join(_lines(table)))

        convert.quantize(
            opened.contents(), opened.config, opened.tokenizer, form, asked.out, finish,
            lambda done, total: report("quantizing", done, total),
        )  # fmt: skip
    if note:
        print(note)
    print(f"{asked.out} is ready: {_use(asked)}")


def _form(asked: Arguments) -> convert.Form:
    if asked.format in ("nf4", "fp4", "int8"):
        return convert.BnbForm(kind=asked.format, double_quant=asked.double_quant, dtype=asked.dtype)
    if asked.double_quant:
        raise UserError(f"--double-quant is of nf4 and fp4; {asked.format} has no such thing")
    return convert.GgufForm(kind=cast(convert.GgufKind, asked.format.removeprefix("gguf-")))


def open_for_quantizing(source: str, step: int | None = None) -> Opened:
    """What is at `source`, on the mesh that is set; nothing is read yet, except of a run or an imported folder.

    Raises:
      UserError: what opening it raises, or a model that is quantized already.
    """
    folder = Path(source).expanduser()
    if (folder / "run.json").is_file() or (folder / RECORD).is_file():
        trained = open_trained(folder, Precision(compute="float32"), print, step, needs_tokenizer=False)
        config, params = trained.model.config, trained.params
        return Opened(
            config=config,
            tokenizer=trained.its_tokenizer,
            contents=lambda: convert.live_tensors(params, config, np.dtype(np.float32)),
            load=lambda model: params,
            texts=_held_out(RunFolder(folder)) if (folder / "run.json").is_file() else {},
        )
    if step is not None:
        raise UserError(f"--step {step} is of a run, and {source} is none")
    opened = convert.open_source(source)
    if convert.is_quantized(opened.tensors):
        raise UserError(f"{source} is quantized already: name the model that it was made from")
    return Opened(
        config=opened.config,
        tokenizer=None if opened.tokenizer is None else load_tokenizer(opened.tokenizer),
        contents=lambda: convert.contents_of(opened.tensors, opened.config),
        load=lambda model: opened.load(model.abstract_params()),
        texts={},
    )


def _held_out(folder: RunFolder) -> dict[str, list[str]]:
    """The beginning of a run's held-out text, if its store is still where it was."""
    if not folder.ledger.is_file():
        return {}
    stores = [Path(row["store"]) for row in json.loads(folder.ledger.read_text(encoding="utf-8"))]
    texts: list[str] = []
    opened = [Store.open(path) for path in stores if path.is_dir()]
    whole = sum(store.split("val").num_tokens for store in opened)
    left = _HELD_OUT_TOKENS
    for store in opened:
        split, tokenizer = store.split("val"), store.tokenizer()
        for number in range(split.num_documents):
            if not left:
                break
            start, stop = split.document_range(number)
            tokens = split.tokens(start, min(stop, start + left))
            left -= len(tokens)
            texts += (
                [tokenizer.decode([i for i in tokens.tolist() if i != tokenizer.eot_id])] if len(tokens) > 1 else []
            )
    part = Part(used=_HELD_OUT_TOKENS - left, of=whole, unit="tokens")
    name = f"held-out text (a try: {part})" if part.limited else "held-out text"
    return {name: texts} if texts else {}


def _measure(
    model: Model,
    tokenizer: Tokenizer | None,
    mesh: jax.sharding.Mesh,
    texts: dict[str, list[str]],
    questions: dict[str, list[choices.Question]],
    report: Progress,
    params: Tree,
) -> dict[str, float]:
    """Each figure by its name."""
    assert tokenizer is not None, "checked"
    scorer = Scorer(model, params, mesh)
    found: dict[str, float] = {}
    for name, documents in texts.items():
        measured = perplexity.measure(scorer, tokenizer, documents, report)
        found[f"token perplexity, {name}"] = measured.token_perplexity
        found[f"bits per byte, {name}"] = measured.bits_per_byte
    for name, asked in questions.items():
        accuracy = choices.choose(scorer, tokenizer, asked, report)
        found[f"accuracy, {name}"], found[f"normalised accuracy, {name}"] = accuracy.acc, accuracy.acc_norm
    return found


def quality_table(before: dict[str, float], after: dict[str, float], bytes_before: int, bytes_after: int) -> Table:
    """What was, what is, and the difference."""
    rows = [
        (name, f"{value:.4f}", f"{after[name]:.4f}", f"{(after[name] / value - 1) * 100:+.2f}%" if value else "")
        for name, value in before.items()
    ]
    share = (bytes_after / bytes_before - 1) * 100
    rows += [("bytes", f"{bytes_before:,} (bfloat16)", f"{bytes_after:,}", f"{share:+.1f}%")]
    note = "" if before else "Quality was not measured: --eval-text and --eval-choices do."
    return Table(header=("", "before", "after", "difference"), rows=rows, note=note)


def _bytes_before(config: ModelConfig) -> int:
    return 2 * sum(math.prod(shape) for shape in parameter_shapes(config).values())


def _sizes(folder: Path) -> list[int]:
    return [path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf")]


def _lines(table: Table) -> list[str]:
    cells = [tuple(table.header), *(tuple(row) for row in table.rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(table.header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [*lines, table.note] if table.note else lines


def _front(asked: Arguments) -> dict[str, Any]:
    """The fields that open the card; the base is named where the hub knows it."""
    gguf = asked.format.startswith("gguf")
    fields: dict[str, Any] = {"pipeline_tag": "text-generation", "tags": ["meshgpt", asked.format]}
    fields["library_name"] = "gguf" if gguf else "transformers"
    base = hub_id(asked.source)
    return fields | ({"base_model": base, "base_model_relation": "quantized"} if base else {})


def _card(asked: Arguments, note: str, table: Table) -> list[Block]:
    double = ", double quantization" if asked.double_quant else ""
    what = f"{asked.source}, quantized to {asked.format}{double} with meshgpt {meshgpt.__version__}."
    return [
        Heading(level=1, text=asked.out.name),
        Text(text=f"{what} Its licence, training and limitations are those of that model: see its card."),
        *([Text(text=f"For whoever loads it: {note}.")] if note else []),
        Heading(level=2, text="Before and after"),
        table,
        Heading(level=2, text="How to use"),
        Code(language="text" if asked.format.startswith("gguf") else "python", text=_use(asked)),
    ]


def _use(asked: Arguments) -> str:
    if asked.format.startswith("gguf"):
        return f"llama-cli -m {asked.out / ('model-' + asked.format.removeprefix('gguf-') + '.gguf')} -p ..."
    return f"transformers.AutoModelForCausalLM.from_pretrained({str(asked.out)!r})"
