"""Other people's weights: into a folder of ours (`meshgpt import`), and as what a run starts from (`--init`)."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from meshgpt import convert
from meshgpt.atomic import rename_folder, write_atomically
from meshgpt.checkpoint import manifest
from meshgpt.checkpoint.manager import Checkpointer, Checkpointing, completed_steps, latest_step, restore_params
from meshgpt.config import Run, from_json, to_json
from meshgpt.convert import hub
from meshgpt.data.special_tokens import check_carried
from meshgpt.data.tokenizer import Tokenizer, load_tokenizer
from meshgpt.data.tokenizer_difference import difference
from meshgpt.errors import UserError
from meshgpt.models.model import Model, ModelConfig
from meshgpt.models.precision import Float, Precision
from meshgpt.models.trainable import Full, LoRA
from meshgpt.optim.config import AdamW
from meshgpt.settings import json_text
from meshgpt.training.run_folder import RunFolder
from meshgpt.trees import Tree, map_with_names

RECORD = "imported.json"

_NOT_LOADABLE = (
    "{0} is not a model that these adapters fit in other tools: meshgpt export {0} --out BASE writes one; then put "
    "BASE for base_model_name_or_path in adapter_config.json"
)


def import_model(source: str, out: Path, surgery: convert.Surgery, dtype: Float, report: Callable[[str], None]) -> None:
    """`source` as a checkpoint folder of ours, on the mesh that is set; `out` appears whole or not at all.

    `out` then holds `imported.json` (architecture, source, notes), `checkpoints/` with digests, and `tokenizer/`;
    `meshgpt generate`, `meshgpt export` and `--init` take it.

    Raises:
      UserError: what `convert.open_source` raises, or `out` is taken.
    """
    if out.exists():
        raise UserError(f"{out} exists: give a new folder")
    opened = convert.open_source(source, surgery)
    for note in opened.notes:
        report(note)
    model = Model(config=opened.config, precision=Precision(params=dtype))
    params = opened.load(model.abstract_params())
    partial = out.absolute().with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        record: dict[str, Any] = {"model": to_json(opened.config), "dtype": dtype, "source": source}
        record |= {"notes": list(opened.notes), "changed": opened.changed}
        with Checkpointer(partial / "checkpoints", Checkpointing(), report=report) as checkpoints:
            checkpoints.save(opened.step, {"params": params}, record)
        if opened.tokenizer is not None:
            load_tokenizer(opened.tokenizer).save(partial / "tokenizer")
            check_carried(opened.tokenizer, partial / "tokenizer")
        write_atomically(partial / RECORD, json_text(record, indent=2) + "\n")
        rename_folder(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imported:
    """A folder that `import_model` wrote."""

    folder: Path
    config: ModelConfig
    dtype: Float
    notes: tuple[str, ...]

    @staticmethod
    def open(folder: Path) -> "Imported":
        try:
            record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            config = from_json(ModelConfig, record["model"], f"{folder / RECORD}: model")
            return Imported(folder=folder, config=config, dtype=record["dtype"], notes=tuple(record["notes"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / RECORD} is damaged ({error!r}): import the model again") from error

    def load(self, abstract: Tree, report: Callable[[str], None]) -> Tree:
        """The parameters, placed and typed like `abstract`."""
        kept = map_with_names(
            lambda _, leaf: jax.ShapeDtypeStruct(leaf.shape, self.dtype, sharding=leaf.sharding), abstract
        )
        step = latest_step(self.folder / "checkpoints", report)
        if step is None:
            raise UserError(f"{self.folder} has no checkpoint: import the model again")
        params = restore_params(self.folder / "checkpoints", step, kept)
        return jax.tree.map(lambda value, leaf: value.astype(leaf.dtype), params, abstract)

    @property
    def tokenizer(self) -> Path | None:
        return self.folder / "tokenizer" if (self.folder / "tokenizer").is_dir() else None


def adopt(run: Run, folder: RunFolder) -> Run:
    """`run` with the sizes of the model that `run.init` names; dropout and padding stay the recipe's.

    A run that goes on in its folder keeps the sizes it was started with, and needs the source no more.

    Raises:
      UserError: what opening the source raises, a model of the other family, or none where `run.trainable` needs one.
    """
    if not run.init:
        if not isinstance(run.trainable, Full):
            raise UserError(
                f"{type(run.trainable).__name__} trains a part of a model that is there already: name it with --init"
            )
        return run
    if run.resume != "never" and folder.holds_run():
        recorded = folder.read_run()
        if recorded.init == run.init and type(recorded.model) is type(run.model):
            return dataclasses.replace(run, model=_sized(run.model, recorded.model))
    config = _open(run.init).config
    if type(config) is not type(run.model):
        raise UserError(
            f"--init {run.init} is a {type(config).__name__.removesuffix('Config')} and the recipe's model a "
            f"{type(run.model).__name__.removesuffix('Config')}: use a recipe of that family"
        )
    return dataclasses.replace(run, model=_sized(run.model, config))


def _sized(recipe: Any, source: Any) -> Any:
    kept = [field.name for field in dataclasses.fields(recipe) if "dropout" in field.name]
    return dataclasses.replace(source, **{name: getattr(recipe, name) for name in [*kept, "vocab_multiple"]})


def record_origin(run: Run, folder: RunFolder) -> None:
    """Writes `init.json`, once: what the run started from, and what was decided or changed on the way in.

    `hub` is its id on the hub, null where only its name looks like one; `quantized` says that it is in 4 or 8 bits.
    """
    if not run.init or folder.origin.exists():
        return
    opened = _open(run.init)
    record: dict[str, Any] = {"source": run.init, "notes": list(opened.notes)}
    found = hub_id(run.init)
    if found or hub.is_id(run.init):  # a folder whose name could be an id is not taken for one later, elsewhere
        record["hub"] = found
    if not isinstance(opened, Imported) and convert.is_quantized(opened.tensors):
        record["quantized"] = True
    write_atomically(folder.origin, json_text(record, indent=2) + "\n")


def hub_id(source: str) -> str | None:
    """The hub id (without a revision) that weights come from; of an imported folder, that of what was imported."""
    folder = Path(source).expanduser()
    if (folder / RECORD).is_file():
        return hub_id(json.loads((folder / RECORD).read_text(encoding="utf-8"))["source"])
    return None if folder.exists() or not hub.is_id(source) else source.partition("@")[0]


def base_for_others(source: str) -> tuple[str, str]:
    """What other tools are to take for the model at `source`, and what to say where they cannot ("" where they can).

    Of an imported folder it is what was imported, unless surgery made another model of that.
    """
    folder = Path(source).expanduser()
    if (folder / RECORD).is_file():
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if not record.get("changed", bool(record["notes"])):  # records of before do not say
            name, problem = base_for_others(record["source"])
            return (source, _NOT_LOADABLE.format(source)) if problem else (name, "")
        return source, _NOT_LOADABLE.format(source)
    if not folder.is_dir():
        return source, ""
    if not (folder / "config.json").is_file():
        return source, f"{source} is no Hugging Face folder: meshgpt import makes one of ours, and export one of theirs"
    entries = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return source, _NOT_LOADABLE.format(source) if entries["model_type"] == "phi" else ""


def initial_params(run: Run, model: Model, say: Callable[[str], None]) -> Tree:
    """The parameters that `run.init` holds, on the mesh that is set; beneath adapters, in the bits they are kept in."""
    opened = _open(run.init)
    if isinstance(opened, Imported):
        return opened.load(model.abstract_params(), say)
    for note in opened.notes:
        say(note)
    load = opened.load_as_kept if isinstance(run.trainable, LoRA) else opened.load
    return load(model.abstract_params())


def initial_moments(run: Run, model: Model) -> convert.Moments | None:
    """Adam's moments, where `run.init` has them (Mesh-Transformer-JAX's checkpoints)."""
    opened = _open(run.init)
    if isinstance(opened, Imported) or opened.adam is None:
        return None
    return opened.load_moments(*_moment_forms(model.abstract_params(), run))


def check_tokenizer(run: Run, tokenizer: Tokenizer) -> None:
    """Raises UserError where the tokenizer of `run.init` gives other ids than the run's."""
    theirs = _open(run.init).tokenizer
    if theirs is not None:
        _check_tokenizer(load_tokenizer(theirs), tokenizer, run.init)


def identity(source: str) -> dict[str, str]:
    """Where weights come from, and one digest of every number in them, wherever they lie.

    It is of the names, shapes and contents of all tensors; of an imported folder, of its checkpoint's own digests.
    """
    opened = _open(source)
    whole = hashlib.sha256()
    if isinstance(opened, Imported):
        step = completed_steps(opened.folder / "checkpoints")[-1]
        whole.update(manifest.manifest_path(opened.folder / "checkpoints" / str(step)).read_bytes())
        return {"source": source, "sha256": whole.hexdigest()}

    def one(name: str) -> str:
        contents = np.ascontiguousarray(opened.tensors.entries[name].map())
        said = f"{name} {contents.dtype} {contents.shape} "
        return said + hashlib.sha256(contents.reshape(-1).view(np.uint8).data).hexdigest()

    with ThreadPoolExecutor() as pool:
        for line in pool.map(one, sorted(opened.tensors.entries)):
            whole.update(line.encode())
    return {"source": source, "sha256": whole.hexdigest()}


def check_identity(found: dict[str, str], recorded: Any, since: str) -> None:
    """Raises UserError where the base of a run (an `identity`) is not the one that was recorded at `since`."""
    if recorded["sha256"] != found["sha256"]:
        raise UserError(
            f"--init {found['source']} holds other weights than the run was built on at {since} (sha256 then "
            f"{recorded['sha256'][:12]}, now {found['sha256'][:12]}; then at {recorded['source']}): what was trained "
            "beside those means nothing beside these. Give the former weights, or another --run-dir"
        )


def _moment_forms(abstract: Tree, run: Run) -> tuple[Tree, Tree]:
    def form(dtype: str) -> Tree:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), abstract)

    return form(run.optim.moment_dtype if isinstance(run.optim, AdamW) else "float32"), form("float32")


def _open(source: str) -> "convert.Source | Imported":
    folder = Path(source).expanduser()
    return Imported.open(folder) if (folder / RECORD).is_file() else convert.open_source(source)


def _check_tokenizer(theirs: Tokenizer, ours: Tokenizer, source: str) -> None:
    if found := difference(theirs, ours):
        raise UserError(
            f"the tokenizer of {source} gives other ids than the one that the text was prepared with: {found}, in this "
            "order. Prepare the text with --tokenizer set to that model's folder"
        )
