"""A trained model from wherever it lies: a run's folder, or a Hugging Face folder."""

import dataclasses
from collections.abc import Callable
from os import PathLike
from pathlib import Path

import jax

from meshgpt import convert
from meshgpt.checkpoint import manifest
from meshgpt.checkpoint.manager import completed_steps, latest_step, read_metadata, restore_params
from meshgpt.config import Run
from meshgpt.convert import hub
from meshgpt.data.tokenizer import Tokenizer, load_tokenizer
from meshgpt.errors import UserError
from meshgpt.models.model import Model
from meshgpt.models.precision import Precision
from meshgpt.models.trainable import Full, LoRA
from meshgpt.training.pretrained import RECORD, Imported, check_identity, identity, initial_params
from meshgpt.training.program import Program
from meshgpt.training.run_folder import RunFolder
from meshgpt.trees import Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """A model with its parameters on the mesh that is set. step: of the checkpoint, None for a Hugging Face folder.

    its_tokenizer: None where there is none and `open_trained` was told that none is needed.
    """

    model: Model
    params: Tree
    its_tokenizer: Tokenizer | None
    step: int | None

    @property
    def tokenizer(self) -> Tokenizer:
        assert self.its_tokenizer is not None, "opened as one that needs none"
        return self.its_tokenizer


def open_trained(
    source: str | PathLike[str],
    precision: Precision,
    report: Callable[[str], None],
    step: int | None = None,
    *,
    needs_tokenizer: bool = True,
) -> Trained:
    """Opens `source` on the mesh that is set: a run's folder (the newest intact checkpoint, or the one of `step`), an
    imported folder, a Hugging Face folder, or a hub id, which is downloaded.

    `needs_tokenizer`: a folder of weights alone is refused.

    Raises:
      UserError: nothing there that can be read, or no intact checkpoint (of that step).
    """
    name, source = str(source), Path(source)
    if not source.exists() and hub.is_id(name):
        source = hub.download(name)
    if (source / "run.json").is_file():
        return _from_run(RunFolder(source), precision, report, step)
    kind = "an imported" if (source / RECORD).is_file() else "a Hugging Face"
    if step is not None and source.is_dir():
        raise UserError(f"--step {step}: {source} is {kind} folder, which has no steps to choose from")
    if (source / RECORD).is_file():
        imported = Imported.open(source)
        model = Model(config=imported.config, precision=precision)
        if imported.tokenizer is None and needs_tokenizer:
            raise UserError(f"{source} was imported without a tokenizer: copy one to {source / 'tokenizer'}")
        found = None if imported.tokenizer is None else load_tokenizer(imported.tokenizer)
        params = imported.load(model.abstract_params(), report)
        return Trained(model=model, params=params, its_tokenizer=found, step=None)
    if (source / "config.json").is_file():
        model = Model(config=convert.read_config(source), precision=precision)
        found = load_tokenizer(source) if needs_tokenizer or convert.tokenizer_of(source) else None
        params = convert.load(source, model.config, model.abstract_params())
        return Trained(model=model, params=params, its_tokenizer=found, step=None)
    what = f"has none of run.json, {RECORD} and config.json" if source.is_dir() else "does not exist"
    raise UserError(f"{source} {what}: give a run's folder, an imported one, a Hugging Face folder, or a hub id")


def _from_run(folder: RunFolder, precision: Precision, report: Callable[[str], None], step: int | None) -> Trained:
    run = folder.read_run()
    # Parameters are read in the dtype they were trained in; only the computation follows `precision`.
    policy = dataclasses.replace(precision, params=run.precision.params)
    model = Model(config=run.model, execution=run.execution, precision=policy)
    found = _step(folder, report, step)
    params = restore_params(folder.checkpoints, found, Program(run=run).abstract_params())
    frozen = {} if isinstance(run.trainable, Full) else _base(run, folder, found, model, report)
    return Trained(
        model=model,
        params=run.trainable.merged(params, frozen),
        its_tokenizer=load_tokenizer(folder.tokenizer),
        step=found,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters:
    """What a run with LoRA has trained, on the mesh that is set."""

    run: Run
    part: LoRA
    params: Tree
    tokenizer: Tokenizer
    step: int


def open_adapters(source: Path, report: Callable[[str], None], step: int | None = None) -> Adapters:
    """The adapters alone of a run; its base is not read.

    Raises:
      UserError: no run, one that trains something else, or no intact checkpoint (of that step).
    """
    folder = RunFolder(source)
    run = folder.read_run()
    if not isinstance(run.trainable, LoRA):
        kind = type(run.trainable).__name__
        raise UserError(f"--adapter: {source} was trained with {kind}, not LoRA, and has no adapters; leave it out")
    found = _step(folder, report, step)
    params = restore_params(folder.checkpoints, found, Program(run=run).abstract_params())
    tokenizer = load_tokenizer(folder.tokenizer)
    return Adapters(run=run, part=run.trainable, params=params, tokenizer=tokenizer, step=found)


def _base(run: Run, folder: RunFolder, step: int, model: Model, report: Callable[[str], None]) -> Tree:
    """What the run read beside what it trained, which must still be the same."""
    check_identity(identity(run.init), read_metadata(folder.checkpoints, step)["base"], f"step {step:,}")
    _, frozen = run.trainable.start(initial_params(run, model, report), model.abstract_params(), jax.random.key(0))
    return frozen


def _step(folder: RunFolder, report: Callable[[str], None], step: int | None) -> int:
    """The newest intact step, or `step` if it is intact."""
    found = latest_step(folder.checkpoints, report) if step is None else _intact(folder, step)
    if found is None:
        raise UserError(f"{folder.path} has no checkpoint yet: train for some steps first")
    return found


def _intact(folder: RunFolder, step: int) -> int:
    kept = completed_steps(folder.checkpoints)
    if step not in kept:
        raise UserError(f"--step {step}: {folder.path} keeps the checkpoints of steps {kept}")
    try:
        manifest.verify(folder.checkpoints / str(step))
    except manifest.DamagedError as damage:
        raise UserError(f"--step {step}: that checkpoint of {folder.path} cannot be used: {damage}") from damage
    return step
