"""The teacher of a run that distils: read at every start, what its student may begin as, and what both are worth."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from meshgpt import convert
from meshgpt.atomic import write_atomically
from meshgpt.config import Run
from meshgpt.data.tokenizer import Tokenizer
from meshgpt.data.tokenizer_difference import difference
from meshgpt.errors import UserError
from meshgpt.evals import results
from meshgpt.models.layers import Weight
from meshgpt.models.model import Model, ModelConfig
from meshgpt.objectives.distillation import TEACHER, Distill, chosen_layers
from meshgpt.objectives.loss import next_token_loss
from meshgpt.settings import json_text
from meshgpt.training.init_state import Start
from meshgpt.training.load import open_trained
from meshgpt.training.pretrained import RECORD, Imported
from meshgpt.training.program import Program
from meshgpt.training.run_folder import RunFolder
from meshgpt.training.step import make_eval_step
from meshgpt.training.validation import Validation
from meshgpt.trees import Tree, leaves_with_names, map_with_names

_ROWS = ("wte_VD", "head_VD", "head_bias_V")  # what has a row for each id


def with_teacher(run: Run) -> Run:
    """`run` with the sizes of its teacher, read from there; another objective has none.

    Raises:
      UserError: no teacher there, or one that cannot stand beside the student.
    """
    if not isinstance(run.objective, Distill):
        return run
    objective = dataclasses.replace(run.objective, teacher_model=_config(_folder(run.objective.teacher)))
    objective.teacher_for(Model(config=run.model, precision=run.precision))
    if objective.start == "teacher" and not run.init:
        chosen_layers(objective, run.model.n_layers)
    return dataclasses.replace(run, objective=objective)


def beside_teacher(
    program: Program, tokenizer: Tokenizer, begun: Start, *, fresh: bool, say: Callable[[str], None]
) -> Start:
    """`begun` with the teacher among what the run only reads; a fresh student starts from it where that is asked for.

    Raises:
      UserError: a teacher with another tokenizer, or of other shapes than a student that starts from it.
    """
    run, objective = program.run, program.run.objective
    if not isinstance(objective, Distill):
        return begun
    takes = fresh and objective.start == "teacher" and not run.init
    taught = objective.teacher_for(program.model)
    whole = _read(objective, taught, tokenizer, run.precision.params if takes else objective.teacher_dtype, say)
    state = begun.state
    if takes:
        layers = chosen_layers(objective, run.model.n_layers)
        say(f"the student starts from layers {', '.join(map(str, layers))} of the teacher, and its embeddings")
        state, _ = program.start(student_params(whole, layers, program.model))
    kept = jax.tree.map(lambda leaf: _cast(leaf, taught.precision.params_dtype), whole, is_leaf=_is_low_bit)
    return dataclasses.replace(begun, state=state, frozen=begun.frozen | {TEACHER: kept})


def student_params(teacher: Tree, layers: tuple[int, ...], student: Model) -> Tree:
    """The student's parameters from the teacher's `layers` and whatever lies outside of the blocks.

    Raises:
      UserError: naming the first parameter whose shape is another one.
    """
    found = dict(leaves_with_names(jax.tree.map(_Held, teacher, is_leaf=_is_low_bit)))

    def one(name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        held = found[name].leaf if name in found else None
        taken = None if held is None else (_layers(held, layers, like.dtype) if name.startswith("blocks/") else held)
        if taken is None or taken.shape != like.shape:
            raise UserError(
                f"the student's {name} is {like.shape} and the teacher has {None if taken is None else taken.shape}: "
                "a student that starts from its teacher is of the same family and width. Give --objective.start fresh, "
                "or name another start with --init"
            )
        return jax.sharding.reshard(taken.astype(like.dtype), like.sharding.spec)

    return map_with_names(one, student.abstract_params())


@dataclasses.dataclass(frozen=True)
class _Held:
    """Keeps a weight of few bits in one piece where a tree is taken apart."""

    leaf: jax.Array | Weight


def _layers(leaf: jax.Array | Weight, layers: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    def one(layer: int) -> jax.Array:
        part = jax.tree.map(lambda stack: stack[layer], leaf)
        return part.dense(dtype) if isinstance(part, Weight) else part

    return jnp.stack([one(layer) for layer in layers])


def record_before(program: Program, validation: Validation, begun: Start, folder: RunFolder) -> None:
    """Writes `distillation.json`, once: the figures of the teacher, and of the student before it is trained."""
    objective = program.run.objective
    if not isinstance(objective, Distill) or validation.held_out is None or folder.distillation.exists():
        return
    loss = next_token_loss(objective.teacher_for(program.model), objective.plain, program.document_end)
    alone = jax.jit(lambda params, frozen, tokens, weights: make_eval_step(loss)(params, tokens, weights))
    teacher = begun.frozen[TEACHER]
    answered = validation.answers(objective.teacher_for(program.model), teacher)
    before = validation.answers(program.model, program.run.trainable.merged(begun.state.params, begun.frozen))
    found = {
        "teacher": objective.teacher,
        "teacher_val_loss": dataclasses.replace(validation, eval_step=alone).held_out_loss(teacher, {}),
        "teacher_evals": results.metrics(answered),
        "student_start_val_loss": validation.held_out_loss(begun.state.params, begun.frozen),
        "student_start_evals": results.metrics(before),
    }
    if jax.process_index() == 0:
        write_atomically(folder.distillation, json_text(found, indent=1) + "\n")


def _folder(source: str) -> Path:
    """Where the teacher lies; one of the hub's is downloaded."""
    folder = Path(source).expanduser()
    return folder if folder.is_dir() else Path(convert.open_source(source).tensors.origin)


def _config(folder: Path) -> ModelConfig:
    if (folder / "run.json").is_file():
        return RunFolder(folder).read_run().model
    return Imported.open(folder).config if (folder / RECORD).is_file() else convert.read_config(folder)


def _read(objective: Distill, taught: Model, tokenizer: Tokenizer, dtype: str, say: Callable[[str], None]) -> Tree:
    """The teacher's parameters, its tables with as many rows as the student's."""
    precision = dataclasses.replace(taught.precision, params=dtype)
    opened = open_trained(_folder(objective.teacher), precision, say)
    theirs = opened.tokenizer
    found = difference(theirs, tokenizer)
    if theirs.vocab_size != tokenizer.vocab_size:
        found = found or f"it has {theirs.vocab_size:,} ids and {tokenizer.vocab_size:,}"
    if found:
        raise UserError(
            f"--objective.teacher {objective.teacher}: its tokenizer gives other ids than the run's: {found}, in this "
            "order. A student can only be taught in the teacher's tokens: prepare the text with --tokenizer set to the "
            "teacher's folder"
        )
    say(f"the teacher is {objective.teacher}")
    rows = taught.config.padded_vocab
    return map_with_names(lambda name, leaf: _with_rows(leaf, rows) if name in _ROWS else leaf, opened.params)


def _with_rows(table: jax.Array, rows: int) -> jax.Array:
    """The first `rows` of a table, or all of them and zeros."""
    if table.shape[0] == rows:
        return table
    place = jax.typeof(table).sharding.spec
    whole = jax.sharding.reshard(table, PartitionSpec(*(None,) * table.ndim))[:rows]
    missing = [(0, rows - whole.shape[0]), *((0, 0),) * (table.ndim - 1)]
    return jax.sharding.reshard(jnp.pad(whole, missing), place)


def _cast(leaf: jax.Array | Weight, dtype: jnp.dtype) -> jax.Array | Weight:
    return leaf if isinstance(leaf, Weight) else leaf.astype(dtype)


def _is_low_bit(leaf: object) -> bool:
    return isinstance(leaf, Weight)
