"""A run's step programs, put together from its parts: what `train` runs, `aot` compiles elsewhere and `plan` measures.

Every program takes `frozen` beside what it trains: arrays that a run reads and never changes, a dict that is empty for
plain training.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from meshgpt.axes import spec
from meshgpt.config import Run
from meshgpt.models import Model
from meshgpt.optim import learning_rate
from meshgpt.step import (
    Loss,
    Metrics,
    TrainState,
    abstract_state,
    init_state,
    make_eval_step,
    make_train_step,
    next_token_loss,
)
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
        learning_rate(self.run.optim, self.run.steps)
        self.run.optim.direction()
        run = self.run

        def train_step(
            state: TrainState, frozen: Tree, tokens: jax.Array, weights: jax.Array
        ) -> tuple[TrainState, Metrics]:
            seed = jax.random.key(run.seed)
            dropout = jax.random.fold_in(seed, 1) if drops(run) else None
            rounding = jax.random.fold_in(seed, 2) if run.precision.rounding == "stochastic" else None
            loss = self._loss(frozen, run.objective.z_loss)
            step = make_train_step(loss, run.optim, run.steps, dropout, run.precision, rounding)
            return step(state, tokens, weights)

        return train_step

    def eval_step(self) -> EvalStep:
        """The loss that validation reports, without dropout and regularisers; to be jitted."""

        def eval_step(params: Tree, frozen: Tree, tokens: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
            return make_eval_step(self._loss(frozen, 0.0))(params, tokens, weights)

        return eval_step

    def _loss(self, frozen: Tree, z_loss: float) -> Loss:
        del frozen
        objective = dataclasses.replace(self.run.objective, z_loss=z_loss)
        return next_token_loss(self.model, objective, self.document_end)

    def fresh(self) -> TrainState:
        """A new state from the run's seed, on the mesh that is set."""
        key = jax.random.fold_in(jax.random.key(self.run.seed), 0)
        return jax.jit(lambda key: init_state(self.model, self.run.optim, key))(key)

    def abstract(self) -> TrainState:
        """Shapes, dtypes, shardings and memories of the state."""
        return abstract_state(self.model, self.run.optim)

    def abstract_frozen(self) -> Tree:
        """The same of what the run reads and never changes."""
        return {}

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


def drops(run: Run) -> bool:
    """Whether the run's model has dropout."""
    rates = [getattr(run.model, field.name) for field in dataclasses.fields(run.model) if "dropout" in field.name]
    return any(rates)
