"""A trained model from wherever it lies: a run's folder, or a Hugging Face folder."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from meshgpt import digests, hf
from meshgpt.checkpoint import completed_steps, latest_step, restore_params
from meshgpt.errors import UserError
from meshgpt.imported import RECORD, Imported
from meshgpt.models import Model
from meshgpt.precision import Precision
from meshgpt.run_folder import RunFolder
from meshgpt.tokenizer import Tokenizer, load_tokenizer
from meshgpt.trees import Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """A model with its parameters on the mesh that is set. step: of the checkpoint, None for a Hugging Face folder."""

    model: Model
    params: Tree
    tokenizer: Tokenizer
    step: int | None


def open_trained(source: Path, precision: Precision, report: Callable[[str], None], step: int | None = None) -> Trained:
    """Opens `source` on the mesh that is set; of a run, the newest intact checkpoint or the one of `step`.

    Raises:
      UserError: nothing there that can be read, or no intact checkpoint (of that step).
    """
    if (source / "run.json").is_file():
        return _from_run(RunFolder(source), precision, report, step)
    kind = "an imported" if (source / RECORD).is_file() else "a Hugging Face"
    if step is not None and source.is_dir():
        raise UserError(f"--step {step}: {source} is {kind} folder, which has no steps to choose from")
    if (source / RECORD).is_file():
        imported = Imported.open(source)
        model = Model(config=imported.config, precision=precision)
        if imported.tokenizer is None:
            raise UserError(f"{source} was imported without a tokenizer: copy one to {source / 'tokenizer'}")
        params = imported.load(model.abstract_params(), report)
        return Trained(model=model, params=params, tokenizer=load_tokenizer(imported.tokenizer), step=None)
    if (source / "config.json").is_file():
        model = Model(config=hf.read_config(source), precision=precision)
        params = hf.load(source, model.config, model.abstract_params())
        return Trained(model=model, params=params, tokenizer=load_tokenizer(source), step=None)
    what = f"has none of run.json, {RECORD} and config.json" if source.is_dir() else "does not exist"
    raise UserError(f"{source} {what}: give a run's folder, an imported one, or a Hugging Face folder")


def _from_run(folder: RunFolder, precision: Precision, report: Callable[[str], None], step: int | None) -> Trained:
    run = folder.read_run()
    # Parameters are read in the dtype they were trained in; only the computation follows `precision`.
    policy = dataclasses.replace(precision, params=run.precision.params)
    model = Model(config=run.model, execution=run.execution, precision=policy)
    found = latest_step(folder.checkpoints, report) if step is None else _intact(folder, step)
    if found is None:
        raise UserError(f"{folder.path} has no checkpoint yet: train for some steps first")
    params = restore_params(folder.checkpoints, found, model.abstract_params())
    return Trained(model=model, params=params, tokenizer=load_tokenizer(folder.tokenizer), step=found)


def _intact(folder: RunFolder, step: int) -> int:
    kept = completed_steps(folder.checkpoints)
    if step not in kept:
        raise UserError(f"--step {step}: {folder.path} keeps the checkpoints of steps {kept}")
    try:
        digests.verify(folder.checkpoints / str(step))
    except digests.DamagedError as damage:
        raise UserError(f"--step {step}: that checkpoint of {folder.path} cannot be used: {damage}") from damage
    return step
