"""The verbs that make a token store or read a trained model. Each takes its command-line arguments."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from meshgpt import convert, flags, runtime
from meshgpt.data.prepare import Prepare
from meshgpt.data.prepare import prepare as prepare_store
from meshgpt.data.store import Store
from meshgpt.data.unread import told
from meshgpt.distributed.mesh import MeshShape, make_mesh
from meshgpt.errors import UserError
from meshgpt.inference.generate import Sampling, generate_text
from meshgpt.models.precision import Float, Precision
from meshgpt.settings import settings
from meshgpt.training import finish
from meshgpt.training.load import open_adapters, open_trained
from meshgpt.training.pretrained import base_for_others, import_model
from meshgpt.training.trackers import progress_bar

Source = Annotated[Path, tyro.conf.Positional]


def prepare(arguments: Sequence[str]) -> None:
    """meshgpt prepare SOURCE... --out DIR"""
    request = flags.parse(Prepare, arguments, "meshgpt prepare SOURCE...", positional="--sources")
    with progress_bar() as report:
        store = prepare_store(request, report)
    for name in ("train", "val"):
        split = store.split(name)
        print(f"{name}: {split.num_documents:,} documents, {split.num_tokens:,} tokens, {split.num_bytes:,} bytes")
    counts = store.index["counts"]
    if counts["bad_records"]:
        print("\n  ".join([f"{counts['bad_records']:,} bad records were skipped; the first:", *counts["first_bad"]]))
    print(*[f"{line}\n" for line in told(store.index.get("not_read", {}))], sep="", end="")
    if "held_out" in store.index:
        print(f"held out: {store.index['held_out']}; by hash, as is usual, it would have been none or all")
    if counts.get("in_both"):
        print(
            f"{counts['in_both']:,} documents ({counts['in_both_bytes']:,} bytes) whose text is in --val-sources too "
            "were left out of training"
        )
    if counts["duplicates"]:
        print(f"{counts['duplicates']:,} duplicates dropped, {counts['duplicate_bytes']:,} bytes")
    print(*[f"{line}\n" for line in _losses(store, request.vocab_size)], sep="", end="")
    print(f"{store.folder} is ready: train on it with --data.store {store.folder}")


def _losses(store: Store, asked: int | None) -> list[str]:
    """What of the text the tokens do not hold, in words."""
    counts, lines = store.index["counts"], []
    if counts["replaced"]:
        lines.append(
            f"{counts['replaced']:,} bytes in {counts['replaced_documents']:,} documents were not UTF-8 and became "
            "U+FFFD: name what the files are written in with --encoding, or skip such documents with "
            "--on-invalid-utf8 error --bad-records skip"
        )
    if counts.get("lossy_documents"):
        lines.append(
            f"the tokenizer loses {counts['lost_characters']:,} characters of {counts['lossy_documents']:,} documents "
            f"and has {counts['unknown_tokens']:,} unknown tokens for them: decoding does not give the text back"
        )
    if counts.get("lossy_held_out"):
        lines.append("bits per byte will not be given for the held-out text, of which some is lost")
    if asked is not None and store.vocab_size < asked:
        lines.append(
            f"the tokenizer has {store.vocab_size:,} ids, not {asked:,}: the text that it was trained on has no more "
            "pairs that occur twice. Give more text, or a larger --tokenizer-bytes"
        )
    return lines


@settings()
class GenerateArguments:
    """Text from a trained model."""

    source: Source
    """A run's folder, or a Hugging Face folder."""
    prompt: tuple[str, ...] = ("",)
    """Texts to continue, all of them together; an empty one starts a new text."""
    parse_special: bool = False
    """Take special tokens written in a prompt, such as `<|im_start|>`, for their ids; otherwise they are text."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = Sampling()
    """How new tokens are drawn."""
    precision: Precision = Precision()
    """The dtypes of parameters and of computation."""
    mesh: MeshShape = MeshShape()
    """How devices are arranged."""
    step: int | None = None
    """Step of the checkpoint to take, of a run; None takes the newest."""


def generate(arguments: Sequence[str]) -> None:
    """meshgpt generate SOURCE --prompt TEXT"""
    asked = flags.parse(GenerateArguments, arguments, "meshgpt generate")
    runtime.start()
    with jax.set_mesh(make_mesh(asked.mesh)):
        trained = open_trained(asked.source, asked.precision, print, asked.step)
        texts = generate_text(
            trained.model, trained.params, trained.tokenizer, list(asked.prompt), asked.sampling,
            parse_special=asked.parse_special,
        )  # fmt: skip
    for prompt, several in zip(asked.prompt, texts, strict=True):
        for text in several:
            print(f"{prompt}{text}")
            print("-" * min(72, shutil.get_terminal_size().columns))


@settings()
class ExportArguments:
    """A run as a Hugging Face folder, reopened from disk and compared with the live model before it gets its name."""

    source: Source
    """A run's folder, an imported one, or a quantized Hugging Face folder, which is dequantized."""
    out: Path
    """Folder to write."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the weights that are written."""
    family: Annotated[Literal["own", "phi"], tyro.conf.arg(name="as")] = "own"
    """The name that the model goes by: `own`, or `phi`, under which GPT-J is known to more programs (the same model,
    its numbers in other places)."""
    mesh: MeshShape = MeshShape()
    """How devices are arranged."""
    step: int | None = None
    """Step of the checkpoint to take, of a run; None takes the newest."""
    overwrite: bool = dataclasses.field(default=False, metadata={flags.OTHER_NAMES: ("replace",)})
    """Replace an earlier export at `out`."""
    merge: bool = False
    """Write base and adapters of a run with LoRA summed up to one model, which is done anyway."""
    adapter: bool = False
    """Write the adapters of a run with LoRA alone, as a folder that PEFT loads beside the base."""

    def __post_init__(self) -> None:
        if self.merge and self.adapter:
            raise UserError("--merge writes a whole model and --adapter the adapters alone: give one of them")
        if self.adapter and self.family != "own":
            raise UserError(
                f"--as {self.family} writes a whole model and --adapter the adapters alone: give one of them"
            )


def export(arguments: Sequence[str]) -> None:
    """meshgpt export RUN --out DIR"""
    asked = flags.parse(ExportArguments, arguments, "meshgpt export")
    runtime.start()
    mesh = make_mesh(asked.mesh)
    if asked.adapter:
        with jax.set_mesh(mesh):
            _export_adapter(asked)
        return
    with jax.set_mesh(mesh), progress_bar() as report:
        precision = Precision(compute="float32")
        trained = open_trained(asked.source, precision, print, asked.step, needs_tokenizer=False)
        verdict = finish.export_model(
            trained,
            asked.out,
            dtype=asked.dtype,
            family=asked.family,
            replace=asked.overwrite,
            release=True,
            on_progress=lambda done, total: report("writing", done, total),
        )
    print(verdict)
    print(f"{asked.out} is ready: transformers.AutoModelForCausalLM.from_pretrained({str(asked.out)!r})")


def _export_adapter(asked: ExportArguments) -> None:
    found = open_adapters(asked.source, print, asked.step)
    base, problem = base_for_others(found.run.init)
    line = convert.export_adapter(
        found.params, found.part, found.run.model, base, asked.out, tokenizer=found.tokenizer, replace=asked.overwrite
    )
    print(line)
    if problem:
        print(problem)
    print(f"{asked.out} is ready: peft.PeftModel.from_pretrained(the transformers model of {base}, {str(asked.out)!r})")


@settings()
class ImportArguments:
    """Other people's weights as a checkpoint folder of ours, for generate, export and `--init`."""

    source: Annotated[str, tyro.conf.Positional]
    """A Hugging Face folder, a hub id (owner/name), or a step_N folder of Mesh-Transformer-JAX."""
    out: Path
    """Folder to write; it must not exist."""
    surgery: tyro.conf.OmitArgPrefixes[convert.Surgery] = convert.Surgery()
    """What to change in the model."""
    dtype: Float = "float32"
    """Dtype that the parameters are kept in."""
    mesh: MeshShape = MeshShape()
    """How devices are arranged."""


def import_weights(arguments: Sequence[str]) -> None:
    """meshgpt import SOURCE --out DIR"""
    asked = flags.parse(ImportArguments, arguments, "meshgpt import")
    runtime.start()
    with jax.set_mesh(make_mesh(asked.mesh)):
        import_model(asked.source, asked.out, asked.surgery, asked.dtype, print)
    print(f"{asked.out} is ready: meshgpt generate {asked.out} --prompt ..., or train with --init {asked.out}")
