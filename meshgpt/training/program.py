"""A run's step programs, put together from its parts: what `train` runs, `aot` compiles elsewhere and `plan` measures.

Every program takes `frozen` beside what it trains: arrays that a run reads and never changes, a dict that is empty for
plain training.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from meshgpt.config import Objective, Run
from meshgpt.distributed.mesh import spec
from meshgpt.distributed.replicas import digests_every
from meshgpt.models import flops
from meshgpt.models.model import Model, parameter_shapes
from meshgpt.objectives.loss import Loss
from meshgpt.optim.config import learning_rate, resting
from meshgpt.optim.schedules import Extension
from meshgpt.training.step import Metrics, TrainState, from_params, make_eval_step, make_train_step
from meshgpt.trees import Tree

# step(state, frozen, tokens (A, M, T + 1), weights (A, M, T)) -> (state, metrics)
TrainStep = Callable[[TrainState, Tree, jax.Array, jax.Array], tuple[TrainState, Metrics]]
# step(params, frozen, tokens (M, T + 1), weights (M, T)) -> (sum of nats, sum of weights)
EvalStep = Callable[[Tree, Tree, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What a run computes. document_end: the end-of-text id, where attention is to stop at the ends of documents.

    All methods need a mesh set (`jax.set_mesh`); none allocates but `fresh`.
    """

    run: Run
    document_end: int | None = None

    @property
    def model(self) -> Model:
        return Model(config=self.run.model, execution=self.run.execution, precision=self.run.precision)

    def train_step(self) -> TrainStep:
        """The step, to be jitted with the state donated.

        Raises:
          UserError: an optimizer or schedule that cannot be, now and not when the step is traced.
        """
        learning_rate_of(self.run)
        self.run.optim.transformation()
        self.run.trainable.check(self.model.abstract_params())
        run = self.run

        def train_step(
            state: TrainState, frozen: Tree, tokens: jax.Array, weights: jax.Array
        ) -> tuple[TrainState, Metrics]:
            seed = jax.random.key(run.seed)
            dropout = jax.random.fold_in(seed, 1) if drops(run) else None
            rounding = jax.random.fold_in(seed, 2) if run.precision.rounding == "stochastic" else None
            loss = self._loss(frozen, run.objective)
            every = run.check_replicas_every
            inspect = (
                (lambda gradients, step: digests_every(every, jax.tree.leaves(gradients), step)) if every else None
            )
            step = make_train_step(
                loss, run.optim, run.steps, dropout, run.precision, rounding, inspect, extension(run)
            )
            return step(state, tokens, weights)

        return train_step

    def eval_step(self) -> EvalStep:
        """The loss that validation reports, without dropout and regularisers; to be jitted."""

        run = self.run

        def eval_step(params: Tree, frozen: Tree, tokens: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
            return make_eval_step(self._loss(frozen, run.objective.plain))(params, tokens, weights)

        return eval_step

    def _loss(self, frozen: Tree, objective: Objective) -> Loss:
        whole = objective.loss(self.model, frozen, self.document_end)

        def loss(params: Tree, tokens: jax.Array, weights: jax.Array, key: jax.Array | None) -> tuple[Any, Any]:
            return whole(self.run.trainable.joined(params, frozen, key), tokens, weights, key)

        return loss

    def fresh(self) -> TrainState:
        """A new state from the run's seed, on the mesh that is set; of a run that trains all of its parameters."""
        key = jax.random.fold_in(jax.random.key(self.run.seed), 0)
        return jax.jit(lambda key: self.start(self.model.init(key))[0])(key)

    def start(self, base: Tree) -> tuple[TrainState, Tree]:
        """The state that starts from the model's parameters `base`, and what the run reads and never changes.

        Raises:
          UserError: `run.trainable` names what the model does not have.
        """
        abstract = self.model.abstract_params()
        self.run.trainable.check(abstract)
        key = jax.random.fold_in(jax.random.key(self.run.seed), 3)
        params, frozen = self.run.trainable.start(base, abstract, key)
        return from_params(params, self.run.optim, self.run.precision), frozen

    def abstract(self) -> TrainState:
        """Shapes, dtypes, shardings and memories of the state."""
        state, _ = self._abstract()
        return dataclasses.replace(state, opt_state=resting(self.run.optim, state.opt_state))

    def abstract_params(self) -> Tree:
        """Shapes, dtypes and shardings of what is trained."""
        key = jax.random.key(0)
        abstract = self.model.abstract_params()
        return jax.eval_shape(lambda: self.run.trainable.start(self.model.init(key), abstract, key)[0])

    def abstract_frozen(self) -> Tree:
        """The same of what the run reads and never changes."""
        return self._abstract()[1] | self.run.objective.abstract_frozen(self.model)

    def _abstract(self) -> tuple[TrainState, Tree]:
        return jax.eval_shape(lambda: self.start(self.model.init(jax.random.key(0))))

    def lower(self) -> jax.stages.Lowered:
        """The train step for the mesh that is set, which need not exist: nothing is compiled or allocated."""
        run, length = self.run, self.run.sequence_length
        mesh = jax.sharding.get_mesh()
        sharding = jax.sharding.NamedSharding(mesh, spec("_ batch seq"))
        rows = run.global_batch // run.accumulate
        tokens = jax.ShapeDtypeStruct((run.accumulate, rows, length + 1), jnp.int32, sharding=sharding)
        weights = jax.ShapeDtypeStruct((run.accumulate, rows, length), jnp.float32, sharding=sharding)
        step = jax.jit(self.train_step(), donate_argnums=0)
        return step.lower(self.abstract(), self.abstract_frozen(), tokens, weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations of a training step, a token, as `models.flops` counts: no recomputation.

    forward, backward: of the model that is trained, where a frozen part saves its own gradients. beside: of the forward
    pass of a model that is only read, a teacher.
    """

    forward: int
    backward: int
    beside: int

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.beside


def training_flops(run: Run) -> Flops:
    """What a token of the run's training takes."""
    forward = flops.forward(parameter_shapes(run.model), run.model.vocab_size, run.sequence_length)
    times = run.trainable.backward(run.model.n_layers)
    backward = times.blocks * forward.blocks + times.attention * forward.attention + times.head * forward.head
    beside = run.objective.flops_beside(run.model, run.sequence_length)
    return Flops(forward=forward.total, backward=round(backward), beside=beside)


def flops_per_token(run: Run) -> int:
    """All of `training_flops`: what MFU and a run's total are counted by."""
    return training_flops(run).total


def learning_rate_of(run: Run) -> optax.Schedule:
    """The learning rate of each of the run's steps (0-based).

    Raises:
      UserError: what extends the run cannot be.
    """
    return learning_rate(run.optim, run.steps, extension(run))


def extension(run: Run) -> Extension:
    """What comes after the steps of the run's schedule."""
    return Extension(run.extend, run.extend_schedule)


def drops(run: Run) -> bool:
    """Whether the run's model, or its adapters, have dropout."""
    parts = (run.model, run.trainable)
    rates = [
        getattr(part, field.name) for part in parts for field in dataclasses.fields(part) if "dropout" in field.name
    ]
    return any(rates)
