"""Where a run starts: fresh, from other people's weights, or from its newest checkpoint."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from meshgpt.checkpoint.manager import Checkpointer
from meshgpt.config import Run, changes, from_json, may_change
from meshgpt.data.batch_sizes import BatchSizes
from meshgpt.errors import UserError
from meshgpt.models import flops
from meshgpt.models.precision import LossScale, Precision
from meshgpt.models.trainable import Full
from meshgpt.optim.config import Optimizer, learning_rate
from meshgpt.optim.convert_state import carried, same_state
from meshgpt.optim.schedules import Extension, Piecewise, fitting_warmup
from meshgpt.training.data import RunData
from meshgpt.training.pretrained import check_identity, check_tokenizer, identity, initial_moments, initial_params
from meshgpt.training.program import Program, learning_rate_of
from meshgpt.training.step import TrainState
from meshgpt.trees import Tree, count, leaves_with_names

_OF_THE_RATE = ("steps", "extend", "extend_schedule")  # fields of a run that the learning rate depends on


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """A checkpoint to go on from. metadata: what was kept beside it, the configuration of then among it."""

    step: int
    metadata: dict[str, Any]

    def changes(self, run: Run) -> dict[str, list[Any]]:
        """[then, now] of what `--resume-with-changes` has changed since, by dotted name."""
        all_of_them = changes(self.metadata["run"], run)
        return {name: [old, new] for name, old, new in all_of_them if may_change(name)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """What the loop begins with.

    frozen: what the programs read and never change. metadata: what checkpoints and run.json keep of where the run comes
    from: `batch_sizes`, `history` (of changes), and `base` where it stays as it is.
    """

    state: TrainState
    frozen: Tree
    metadata: dict[str, Any]


def latest_checkpoint(run: Run, checkpoints: Checkpointer) -> ResumePoint | None:
    """The newest intact checkpoint; None where a run is to begin.

    Raises:
      UserError: none where `run.resume` wants one, or one beyond the run's end.
    """
    step = checkpoints.latest()
    if step is None:
        if run.resume == "must":
            raise UserError("--resume must: no checkpoint was saved yet")
        return None
    if step > run.last_step:
        raise UserError(f"the run is at step {step}, beyond --steps {run.last_step}: give at least {step}")
    return ResumePoint(step=step, metadata=dict(checkpoints.metadata(step)))


def batch_sizes(run: Run, point: ResumePoint | None) -> BatchSizes:
    """Sequences of each step: those of before up to `point`, the run's from there on."""
    if point is None:
        return BatchSizes.constant(run.global_batch)
    before = point.metadata.get("batch_sizes") or [[0, point.metadata["run"]["global_batch"]]]
    return BatchSizes.from_json(before).changed(point.step, run.global_batch)


def init_or_restore(
    program: Program, data: RunData, checkpoints: Checkpointer, point: ResumePoint | None, say: Callable[[str], None]
) -> Start:
    """The state at `point`, or a new one; a base that is not trained is read again at every start.

    Raises:
      UserError: other text, or another base, than the run had; a tokenizer of `run.init` that gives other ids than the
        run's.
    """
    run = program.run
    say(_sizes(program))
    _say_warmup(run, say)
    metadata: dict[str, Any] = {"batch_sizes": data.batches.sizes.to_json(), "history": []}
    if point is not None:
        data.check_unchanged(point.metadata.get("data", []), f"step {point.step:,}")
        say(f"resuming from step {point.step:,}")
    frozen, fresh = {}, None
    if run.init and (point is None or not isinstance(run.trainable, Full)):
        check_tokenizer(run, data.tokenizer())
        say(f"starting from {run.init}" if isinstance(run.trainable, Full) else f"beside the weights of {run.init}")
        if not isinstance(run.trainable, Full):
            metadata["base"] = identity(run.init)
            if point is not None:
                check_identity(metadata["base"], point.metadata["base"], f"step {point.step:,}")
        fresh, frozen = program.start(initial_params(run, program.model, say))
    if point is None:
        return Start(state=_new(program, fresh), frozen=frozen, metadata=metadata)
    del fresh
    state, carried_over = restored(program, checkpoints, point)
    metadata["history"] = _history(run, point, carried_over, data.batches.sizes, say)
    return Start(state=state, frozen=frozen, metadata=metadata)


def _new(program: Program, state: TrainState | None) -> TrainState:
    """The run's first state: `state`, of other people's weights, or one drawn at random."""
    if state is None:
        return program.fresh()
    moments = initial_moments(program.run, program.model) if isinstance(program.run.trainable, Full) else None
    return state if moments is None else dataclasses.replace(state, opt_state=moments.into(state.opt_state))


def restored(program: Program, checkpoints: Checkpointer, point: ResumePoint) -> tuple[TrainState, list[str]]:
    """The state at `point` as the run goes on from it, and what became of it in words, where that is another one."""
    run, then = program.run, point.metadata["run"]
    wanted = program.abstract()
    optim: Optimizer = from_json(Optimizer, then["optim"], "the checkpoint's optim")
    precision: Precision = from_json(Precision, then["precision"], "the checkpoint's precision")
    stays = same_state(optim, run.optim)
    if stays and precision.params == run.precision.params and precision.scales_loss == run.precision.scales_loss:
        return TrainState(**checkpoints.restore(point.step, wanted.items())), []
    optim = optim if stays else dataclasses.replace(optim, state_memory="device")
    before = Program(run=dataclasses.replace(run, optim=optim, precision=precision))
    state = TrainState(**checkpoints.restore(point.step, before.abstract().items()))
    params = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), state.params, wanted.params)
    opt_state, notes = (state.opt_state, []) if stays else carried(optim, state.opt_state, run.optim, params)
    notes += [] if precision.params == run.precision.params else [f"parameters: now in {run.precision.params}"]
    scale = state.loss_scale or LossScale.fresh(run.precision.loss_scaling)
    state = dataclasses.replace(
        state, params=params, opt_state=opt_state, loss_scale=scale if run.precision.scales_loss else None
    )
    return state, notes


def _history(
    run: Run, point: ResumePoint, notes: list[str], sizes: BatchSizes, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The changes of the run so far, those at `point` among them, which are said."""
    earlier = list(point.metadata.get("history", []))
    found = point.changes(run)
    jump = _rate_change(run, point)
    if jump:
        everything = changes(point.metadata["run"], run)
        found |= {name: [old, new] for name, old, new in everything if name in _OF_THE_RATE}
        notes = [*notes, jump]
    if not found:
        return earlier
    sequence = sizes.before(point.step)
    if "global_batch" in found:
        old, new = found["global_batch"]
        notes = [*notes, f"data: on at sequence {sequence:,}, {new} a step (was {old}): none is left out or seen again"]
    for note in notes:
        say(f"  {note}")
    return [*earlier, {"step": point.step, "sequences": sequence, "changes": found, "notes": notes}]


def _rate_change(run: Run, point: ResumePoint) -> str:
    """How the learning rate differs from what was planned when `point` was saved, in words; "" where it does not."""
    then, step = point.metadata["run"], point.step
    planned = learning_rate(
        from_json(Optimizer, then["optim"], "the checkpoint's optim"), then["steps"],
        Extension(then.get("extend", 0), then.get("extend_schedule", "constant")),
    )  # fmt: skip
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        steps = np.arange(step + 1)
        before, now = (np.broadcast_to(rate(steps), steps.shape) for rate in (planned, learning_rate_of(run)))
    if np.allclose(before, now, rtol=1e-4, atol=0):
        return ""
    said = f"learning rate: {now[step]:.3g} at step {step + 1:,}, where the schedule so far had {before[step]:.3g}"
    if now[step] > 1.2 * before[step] > 0 and step >= then["steps"] + then.get("extend", 0):
        said += (
            f", a jump to {now[step] / before[step]:.2g} times as much; without it: --steps {then['steps']} "
            f"--extend {run.last_step - then['steps']}"
        )
    return said


def _say_warmup(run: Run, say: Callable[[str], None]) -> None:
    asked = run.optim.warmup_steps
    fits = fitting_warmup(asked, run.steps)
    if fits != asked and not isinstance(run.optim.schedule, Piecewise):
        say(f"a warmup of {asked:,} steps does not fit into a run of {run.steps:,}: shortened to {fits:,}")


def _sizes(program: Program) -> str:
    """The line that says what is trained, in what, on what."""
    run, mesh = program.run, jax.sharding.get_mesh()
    shapes = {name: leaf.shape for name, leaf in leaves_with_names(program.model.abstract_params())}
    counted = flops.count_parameters(shapes, run.model.vocab_size)
    trained = "" if isinstance(run.trainable, Full) else f", {count(program.abstract_params()):,} trained"
    shape, kind = run.mesh.resolve(mesh.size), jax.devices()[0].device_kind
    computing = program.model.precision.compute_dtype
    return f"{counted.total:,} parameters{trained}, computing in {computing}; {mesh.size} x {kind} as {shape}"
