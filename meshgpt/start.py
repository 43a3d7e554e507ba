"""Where a run starts: fresh, from other people's weights, or from its newest checkpoint."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from meshgpt import scaling
from meshgpt.checkpoint import Checkpointer
from meshgpt.errors import UserError
from meshgpt.imported import check_identity, check_tokenizer, identity, initial_moments, initial_params
from meshgpt.program import Program
from meshgpt.run_data import RunData
from meshgpt.step import TrainState
from meshgpt.trainable import Full
from meshgpt.trees import Tree, count, leaves_with_names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """What the loop begins with.

    frozen: what the programs read and never change. metadata: what checkpoints keep of where the run comes from.
    """

    state: TrainState
    frozen: Tree
    metadata: dict[str, Any]


def start(program: Program, data: RunData, checkpoints: Checkpointer, say: Callable[[str], None]) -> Start:
    """The newest intact checkpoint's state, or a new one; a base that is not trained is read again at every start.

    Raises:
      UserError: no checkpoint where `run.resume` wants one; one beyond the run's end; other text, or another base, than
        the run had; a tokenizer of `run.init` that gives other ids than the run's.
    """
    run = program.run
    say(_sizes(program))
    step = checkpoints.latest()
    if step is None and run.resume == "must":
        raise UserError("--resume must: no checkpoint was saved yet")
    if step is not None and step > run.steps:
        raise UserError(f"the run is at step {step}, beyond --steps {run.steps}: give at least {step}")
    found = {} if step is None else checkpoints.metadata(step)
    if step is not None:
        data.check_unchanged(found.get("data", []), f"step {step:,}")
    if isinstance(run.trainable, Full) and step is not None:
        say(f"resuming from step {step:,}")
        return Start(state=_restored(program, checkpoints, step), frozen={}, metadata={})
    if not run.init:
        return Start(state=program.fresh(), frozen={}, metadata={})
    check_tokenizer(run, data.tokenizer())
    if isinstance(run.trainable, Full):
        say(f"starting from {run.init}")
        return Start(state=_from_weights(program, say), frozen={}, metadata={})
    base = identity(run.init)
    if step is not None:
        check_identity(base, found["base"], f"step {step:,}")
    say(f"{'starting' if step is None else f'resuming at step {step:,}'} beside {run.init}")
    state, frozen = program.start(initial_params(run, program.model, say))
    state = state if step is None else _restored(program, checkpoints, step)
    return Start(state=state, frozen=frozen, metadata={"base": base})


def _sizes(program: Program) -> str:
    """The line that says what is trained, in what, on what."""
    run, mesh = program.run, jax.sharding.get_mesh()
    shapes = {name: leaf.shape for name, leaf in leaves_with_names(program.model.abstract_params())}
    counted = scaling.count_parameters(shapes, run.model.vocab_size)
    trained = "" if isinstance(run.trainable, Full) else f", {count(program.abstract_params()):,} trained"
    shape, kind = run.mesh.resolve(mesh.size), jax.devices()[0].device_kind
    computing = program.model.precision.compute_dtype
    return f"{counted.total:,} parameters{trained}, computing in {computing}; {mesh.size} x {kind} as {shape}"


def _from_weights(program: Program, say: Callable[[str], None]) -> TrainState:
    state, _ = program.start(initial_params(program.run, program.model, say))
    moments = initial_moments(program.run, program.model)
    return state if moments is None else dataclasses.replace(state, opt_state=moments.into(state.opt_state))


def _restored(program: Program, checkpoints: Checkpointer, step: int) -> TrainState:
    return TrainState(**checkpoints.restore(step, program.abstract().items()))
