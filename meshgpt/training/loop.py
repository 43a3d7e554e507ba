"""The training loop.

The host stays one step behind the devices: a step is dispatched before the figures of the one before it are fetched.
"""

import dataclasses
import functools
import operator
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from meshgpt import runtime
from meshgpt.checkpoint.manager import Checkpointer
from meshgpt.config import Run, to_json
from meshgpt.distributed import processes, stopping
from meshgpt.distributed.batch import Feed
from meshgpt.distributed.heartbeat import EVALUATING, FINISHING, SAVING, Heartbeat
from meshgpt.distributed.mesh import make_mesh
from meshgpt.distributed.replicas import ReplicaCheck
from meshgpt.distributed.stopping import StopRequests
from meshgpt.distributed.stragglers import StragglerMonitor
from meshgpt.errors import UserError
from meshgpt.models import flops
from meshgpt.models.model import check_divisibility, parameter_shapes
from meshgpt.objectives.document_mask import isolation_prover
from meshgpt.training.callbacks import Callback
from meshgpt.training.data import RunData, open_run_data, without_preparing
from meshgpt.training.finish import check_samples, finish, how_to_go_on
from meshgpt.training.init_state import batch_sizes, init_or_restore, latest_checkpoint
from meshgpt.training.memory import compile_fitting
from meshgpt.training.pretrained import adopt, record_origin
from meshgpt.training.program import Program, TrainStep, flops_per_token
from meshgpt.training.run_folder import RunFolder
from meshgpt.training.sessions import Session
from meshgpt.training.sinks import open_sinks
from meshgpt.training.step import Metrics, TrainState
from meshgpt.training.step_timer import COMPILING, DATA, Clock
from meshgpt.training.teacher import beside_teacher, record_before, with_teacher
from meshgpt.training.trackers import Console, JsonLines, Several
from meshgpt.training.validation import Validation, open_validation
from meshgpt.trees import Tree

_EVALUATION_OWED = "evaluation_owed"  # in a checkpoint's metadata: its step was stopped in its evaluation


def train(run: Run, command: str = "", callbacks: Sequence[Callback] = ()) -> None:
    """Trains, resuming where the run's folder allows, and leaves everything in that folder.

    Returns when the run is finished, or when SIGINT or SIGTERM asked it to stop and it has saved.

    Args:
      command: how to go on with the run, in words of a shell; "" where it was started from Python.
      callbacks: hear of every step, evaluation and checkpoint, on process 0.

    Raises:
      UserError: what stands in the way of the run; among it a `run.run_dir` that is empty, which would be the current
        directory.
      KeyboardInterrupt: a signal came while nothing was to be saved: before the first step, or at the run's end.
    """
    if not run.run_dir:
        raise UserError("Run.run_dir is empty: name the run's folder, such as run_dir='runs/a'")
    folder = RunFolder(Path(run.run_dir))
    run = with_teacher(adopt(run, folder))
    mesh = make_mesh(run.mesh)
    check_divisibility(run.model, run.mesh.resolve(mesh.size), run.global_batch, run.accumulate)
    say, heartbeat = print_line if jax.process_index() == 0 else _silent, Heartbeat()
    checkpointer = partial(Checkpointer, folder.checkpoints, run.checkpointing, report=say, alive=heartbeat.alive)
    with claimed(folder, run, command, say), jax.set_mesh(mesh), checkpointer() as checkpoints:
        point = latest_checkpoint(run, checkpoints)
        sizes = batch_sizes(run, point)
        data = processes.primary_first(
            lambda: open_run_data(run, folder, sizes),
            lambda: open_run_data(without_preparing(run, folder), folder, sizes),
        )
        tokenizer = data.tokenizer()
        if data.validation is not None and not data.validation.lossless:
            say("bits per byte are not given: the tokenizer loses a part of the held-out text")
        check_samples(run, tokenizer)
        loop = Loop.build(run, mesh, data, folder, callbacks if jax.process_index() == 0 else ())
        begun = init_or_restore(loop.program, data, checkpoints, point, say)
        begun = beside_teacher(loop.program, tokenizer, begun, fresh=point is None, say=say)
        loop = dataclasses.replace(loop, frozen=begun.frozen, metadata=loop.metadata | begun.metadata)
        state = begun.state
        if jax.process_index() == 0:  # and not before all checks: what is refused leaves the folder as it was
            folder.record_run(run, command, begun.metadata)
            tokenizer.save(folder.tokenizer)
            data.write_ledger(folder.ledger)
        record_origin(run, folder)
        record_before(loop.program, loop.validation, begun, folder)
        if int(state.step) >= run.last_step and _is_finished(run, folder, int(state.step)):
            say(_finished_already(run, folder, int(state.step)))
            return
        replicas = ReplicaCheck(run.check_replicas_every, mesh, state.items())
        owed = point is not None and bool(point.metadata.get(_EVALUATION_OWED))
        with stopping.deferred() as stop:
            state, stopped = run_steps(loop, folder, state, checkpoints, replicas, heartbeat, stop, evaluate_first=owed)
            step = int(state.step)
            saved = f"stopped at step {step:,} and saved; to go on: {_to_go_on(command)}"
            if stopped:
                say(saved)
                return
            stop.saved(saved if jax.process_index() == 0 else "")
            with heartbeat.busy(FINISHING):
                params = run.trainable.merged(state.params, loop.frozen)
                finish(run, folder, loop.program.model, params, tokenizer, data.first_store, say)
                if jax.process_index() == 0:
                    folder.mark_finished(step)


@contextmanager
def claimed(folder: RunFolder, run: Run, command: str, say: Callable[[str], None]) -> Iterator[None]:
    """`RunFolder.claimed` by process 0, for all."""
    with ExitStack() as held:
        processes.primary_first(lambda: held.enter_context(folder.claimed(run, command, say)), lambda: None)
        processes.check_shared(folder.record)
        yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """What the loop needs besides the state, built once."""

    run: Run
    mesh: jax.sharding.Mesh
    program: Program
    metadata: dict[str, Any]  # kept beside each checkpoint
    data: RunData
    train_step: TrainStep
    validation: Validation
    callbacks: Sequence[Callback] = ()
    frozen: Tree = dataclasses.field(default_factory=dict)  # what the programs read and never change

    @staticmethod
    def build(
        run: Run, mesh: jax.sharding.Mesh, data: RunData, folder: RunFolder, callbacks: Sequence[Callback] = ()
    ) -> "Loop":
        program = Program(run=run, document_end=data.document_end(run))
        return Loop(
            run=run,
            mesh=mesh,
            program=program,
            metadata={"run": to_json(run), "data": data.record()},
            data=data,
            train_step=jax.jit(program.train_step(), donate_argnums=0),
            validation=open_validation(program, mesh, folder, data),
            callbacks=callbacks,
        )


def run_steps(
    loop: Loop, folder: RunFolder, state: TrainState, checkpoints: Checkpointer, replicas: ReplicaCheck,
    heartbeat: Heartbeat, stop: StopRequests, *, evaluate_first: bool = False,
) -> tuple[TrainState, bool]:  # fmt: skip
    """Trains to the last step and saves it; True where a signal stopped it before, or in the evaluation of that step.

    Args:
        evaluate_first: an earlier session was stopped in the evaluation of the state's step, which is made up for.
    """
    run, first = loop.run, int(state.step)
    feed = Feed(loop.mesh, run.accumulate, run.global_batch // run.accumulate)
    all_count = feed.place(np.ones((len(feed.rows), run.sequence_length), np.float32))
    if run.data.mask_documents and first < run.last_step:
        _prove_isolation(loop, feed, state)
    logger = MetricsLogger(loop, folder, first, replicas, heartbeat)
    clock, step_fn = Clock(), None
    batches = clock.waited(iter(loop.data.batches.iterate(first, run.last_step, feed.rows)), DATA)

    save = partial(_save, loop, checkpoints, heartbeat, clock)
    with logger.open(), clock:
        stopped = owed = evaluate_first and not _evaluated(loop, logger, clock, state)
        for step, (tokens, weights) in () if stopped else enumerate(batches, start=first + 1):
            weights = all_count if weights is None else feed.place(weights)
            batch = feed.place(tokens)
            if step_fn is None:
                with clock.on(COMPILING):
                    step_fn = compile_fitting(loop.program, loop.train_step, state, loop.frozen, batch, weights)
                    processes.meet()  # one that compiles for minutes longer keeps no other one in a collective
            with heartbeat.waiting():
                state, metrics = step_fn(state, loop.frozen, batch, weights)
            logger.add(step, metrics)
            if loop.validation.due(step):
                owed = not _evaluated(loop, logger, clock, state)
            saves = step % run.checkpointing.every == 0 and step < run.last_step
            if saves or replicas.due(step):
                logger.flush()  # the metrics of a step come before its checkpoint, after which nothing writes them
                replicas.compare(step, state.items())
            if saves:
                save(state, owed)
            stopped = stop.asked()
            if stopped or logger.diverged:
                break
        logger.flush()
        last = int(state.step)
        replicas.compare(last, state.items())
        save(state, owed, wait=True)
    if last > first and jax.process_index() == 0:
        print_line(str(clock))
    if logger.diverged:
        if jax.process_index() == 0:
            folder.mark_diverged(last)
        raise UserError(f"{logger.diverged}; the last good parameters are saved in {folder.checkpoints}")
    return state, stopped


def _save(
    loop: Loop, checkpoints: Checkpointer, heartbeat: Heartbeat, clock: Clock, state: TrainState, owed: bool, *,
    wait: bool = False,
) -> None:  # fmt: skip
    with heartbeat.busy(SAVING), clock.on(SAVING):
        metadata = loop.metadata | ({_EVALUATION_OWED: True} if owed else {})
        checkpoints.save(int(state.step), state.items(), metadata)
        if wait:
            checkpoints.wait()
    for callback in loop.callbacks:
        callback.on_checkpoint(int(state.step), RunFolder(Path(loop.run.run_dir)).checkpoints / str(int(state.step)))


def _evaluated(loop: Loop, logger: "MetricsLogger", clock: Clock, state: TrainState) -> bool:
    """Logs what is measured after the state's step; False where a signal stopped it."""
    try:
        with logger.evaluating(int(state.step)) as log, clock.on(EVALUATING):
            log(loop.validation.figures(int(state.step), state.params, loop.frozen))
    except stopping.Stopped:
        return False
    return True


def _prove_isolation(loop: Loop, feed: Feed, state: TrainState) -> None:
    tokens = feed.place(loop.data.batches.rows(int(state.step), feed.rows)[0])
    end = loop.data.document_end(loop.run)
    assert end is not None
    params = loop.run.trainable.joined(state.params, loop.frozen, None)
    parts = (tokens[microbatch, :, :-1] for microbatch in range(loop.run.accumulate))
    prove = isolation_prover(loop.program.model, end)
    proved = functools.reduce(operator.add, (prove(params, part) for part in parts))
    if jax.process_index() == 0:
        said = f"{proved.shared_rows} of {proved.rows} rows hold several documents, {proved.documents:,} in all"
        proven = "no token of the first batch sees another document, by gradient"
        print_line(f"{proven} ({said})" if proved.shared_rows else f"the first batch cannot prove masking: {said}")


class MetricsLogger:
    """Fetches a step's metrics when the next step is under way, and passes them to the trackers."""

    def __init__(self, loop: Loop, folder: RunFolder, first: int, replicas: ReplicaCheck, heartbeat: Heartbeat) -> None:
        self._run, self._folder, self._first = loop.run, folder, first
        self._replicas, self._heartbeat = replicas, heartbeat
        self._callbacks = loop.callbacks
        self._pending: tuple[int, Metrics] | None = None
        shapes = parameter_shapes(loop.run.model)
        self._flops = flops_per_token(loop.run)
        self._kinds = [device.device_kind for device in loop.mesh.devices.flat]
        self._facts = {
            "devices": len(self._kinds),
            "device_kind": self._kinds[0],
            "processes": jax.process_count(),
            "parameters": flops.count_parameters(shapes, loop.run.model.vocab_size).total,
            "flops_per_token": self._flops,
            **runtime.compiled_with(),
        }
        self._sizes = loop.data.batches.sizes
        self._since = first, time.monotonic()  # the last logged step, and when; evaluations are left out
        self._tracker = Several([])
        self._stragglers = StragglerMonitor(heartbeat, lambda text: self._tracker.message(text))
        self.diverged = ""  # why the run must stop

    @contextmanager
    def open(self) -> Iterator[None]:
        if jax.process_index() == 0:
            sinks = open_sinks(self._run.sinks, self._folder.path, to_json(self._run), self._first)
            lines = JsonLines(self._folder.metrics, self._first)
            session = Session(self._folder.sessions, self._first, self._facts)
            self._tracker = Several([Console(self._run.last_step, self._first), lines, session, *sinks])
        self._heartbeat.begin(self._first)
        try:
            yield
        finally:
            self._tracker.close()

    def add(self, step: int, metrics: Metrics) -> None:
        self.flush()
        self._pending = step, metrics
        if self._stragglers.several and self._logs(step):
            self.flush()  # with nothing under way, for the comparison of the processes

    @contextmanager
    def evaluating(self, step: int) -> Iterator[Callable[[dict[str, float]], None]]:
        """Yields what takes the figures of an evaluation, whose time does not count as training."""
        self.flush()
        begun = time.monotonic()
        with self._heartbeat.busy(EVALUATING):
            yield partial(self._evaluated, step)
        self._since = self._since[0], self._since[1] + time.monotonic() - begun

    def _evaluated(self, step: int, figures: dict[str, float]) -> None:
        self._tracker.log(step, {"tokens": self._tokens(step), **figures})
        for callback in self._callbacks:
            callback.on_eval(step, figures)

    def flush(self) -> None:
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        with self._heartbeat.waiting():
            fetched = jax.device_get(metrics)
        self._heartbeat.beat(step)
        self._replicas.compare_gradients(step, fetched.pop("inspected", None))
        values: dict[str, Any] = {name: float(value) for name, value in fetched.items()}
        why = diverged(self._run, int(values.pop("streak")), values.get("loss_scale"))
        self.diverged = self.diverged or why  # the step under way when it was found may be a good one
        values["skipped_steps"] = int(values["skipped_steps"])
        for callback in self._callbacks:
            callback.on_step(step, values)
        if self._logs(step):
            values |= {"tokens": self._tokens(step), **self._speed(step), **self._heartbeat.metrics()}
            self._tracker.log(step, values | self._stragglers.metrics(step))

    def _logs(self, step: int) -> bool:
        run = self._run
        return step % run.log_every == 0 or step % run.eval_every == 0 or step in (self._first + 1, run.last_step)

    def _speed(self, step: int) -> dict[str, float]:
        """Since the last logged step; the first of a run counts its compilation."""
        (begun, since), now = self._since, time.monotonic()
        self._since = step, now
        speed = (self._tokens(step) - self._tokens(begun)) / (now - since)
        utilisation = flops.mfu(speed, self._flops, self._kinds)
        return {"tokens_per_second": speed} | ({} if utilisation is None else {"mfu": utilisation})

    def _tokens(self, step: int) -> int:
        return self._sizes.before(step) * self._run.sequence_length


def diverged(run: Run, streak: int, loss_scale: float | None) -> str:
    """Why a run must not go on after so many steps that were skipped, in words, or "" where it may."""
    floor = run.precision.loss_scaling.floor
    if streak and loss_scale is not None and loss_scale <= floor:
        return (
            f"float16 overflowed although the loss scale has fallen to its floor, {floor:g}. Lower --optim.peak-lr "
            "or lengthen --optim.warmup-steps; or choose another --precision.compute, with a new --run-dir"
        )
    if streak >= run.max_bad_steps:
        return (
            f"{run.max_bad_steps} steps in a row had a loss, a gradient, a learning rate or updated parameters that "
            "are not finite, and changed no parameter. Lower --optim.peak-lr, lengthen --optim.warmup-steps, or "
            "compute in float32 (--precision.compute float32) with a new --run-dir"
        )
    return ""


def _is_finished(run: Run, folder: RunFolder, step: int) -> bool:
    """Whether the run's last files are there, and of this step: a kill may have come before them."""
    wanted = [folder.plot] + [folder.samples] * bool(run.samples.prompts) + [folder.export] * (run.export != "none")
    return folder.finished_step() == step and all(path.exists() for path in wanted)


def _to_go_on(command: str) -> str:
    """The command, without what would make it start afresh."""
    return re.sub(r" --resume[ =]never\b", "", command) or "the same command"


def _finished_already(run: Run, folder: RunFolder, step: int) -> str:
    return (
        f"this run is finished: step {step:,} of {run.last_step:,}; its files are in {folder.path}\n"
        f"  longer: {how_to_go_on(run)}\n"
        "  afresh: --resume never (sets this run aside)    elsewhere: --run-dir DIR"
    )


def print_line(text: str) -> None:
    print(text, flush=True)


def _silent(text: str) -> None:
    del text
