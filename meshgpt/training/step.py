"""One training step: gradients of a summed loss over microbatches, one clipped update, one compiled program.

Legend: A microbatches accumulated, M rows of a microbatch, T tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from meshgpt.models.precision import LossScale, Precision, stochastic_round
from meshgpt.objectives.loss import Counted, Loss
from meshgpt.optim.config import Optimizer, learning_rate
from meshgpt.optim.schedules import Extension
from meshgpt.trees import Tree

Metrics: TypeAlias = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    step: steps taken, skipped ones too. skipped: steps whose loss, gradient or learning rate was not finite, which left
    parameters and optimizer untouched, or whose update would have made a parameter infinite or NaN, which left the
    parameters untouched. streak: how many of those came last, in a row. loss_scale: of float16, else None.
    A step whose weights are all zero changes nothing but `step`.
    """

    step: jax.Array
    params: Tree
    opt_state: Tree
    skipped: jax.Array
    streak: jax.Array
    loss_scale: LossScale | None = None

    def items(self) -> dict[str, Tree]:
        """The state as checkpoints keep it."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def from_params(params: Tree, optim: Optimizer, precision: Precision = Precision()) -> TrainState:
    """The state that starts from given parameters."""

    def zero() -> jax.Array:
        return jnp.zeros((), jnp.int32)

    scale = LossScale.fresh(precision.loss_scaling) if precision.scales_loss else None
    return TrainState(zero(), params, optim.transformation().init(params), zero(), zero(), scale)


def make_train_step(
    loss: Loss,
    optim: Optimizer,
    total_steps: int,
    dropout_key: jax.Array | None,
    precision: Precision = Precision(),
    rounding_key: jax.Array | None = None,
    inspect: Callable[[Tree, jax.Array], jax.Array] | None = None,
    extension: Extension = Extension(),
) -> Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, Metrics]]:
    """step(state, tokens (A, M, T + 1), weights (A, M, T)) -> (state, metrics), to be jitted with the state donated.

    `rounding_key` is for parameters that are rounded stochastically. Where there is an `inspect`, what it makes of the
    gradients (sums over tokens) and the number of the step, from 1, is the metric `inspected`. Other metrics, scalars:
    `loss` (mean nats a token of the next-token loss; NaN where all weights are zero), `objective` (the mean of what is
    minimised, where that is more than this loss: with z-loss, or a teacher), `grad_norm` (before clipping),
    `learning_rate`, `tokens` (weights summed), `skipped_steps` and the `streak` of them (`TrainState`); with float16,
    `loss_scale` (of this step).
    """
    rate = learning_rate(optim, total_steps, extension)
    transformation = optim.transformation()

    def train_step(state: TrainState, tokens: jax.Array, weights: jax.Array) -> tuple[TrainState, Metrics]:
        key, scale = _folded(dropout_key, state.step), state.loss_scale
        total, counted, gradients = _accumulate(loss, state.params, tokens, weights, key, scale and scale.value)
        weight = counted.weight if isinstance(counted, Counted) else counted
        inspected = {} if inspect is None else {"inspected": inspect(gradients, state.step + 1)}
        empty, weight_or_1 = weight == 0, jnp.where(weight == 0, 1.0, weight)
        norm = global_norm(gradients) / weight_or_1
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it; everything of ours runs under "strict"
            lr = jnp.asarray(rate(state.step), jnp.float32)
        overflowed = ~(jnp.isfinite(total) & jnp.isfinite(norm)) & ~empty
        finite = ~overflowed & ~empty & jnp.isfinite(lr)
        # One factor does both: from sum to mean, and the clipping.
        clip = jnp.minimum(1.0, optim.clip_norm / norm) if optim.clip_norm else jnp.float32(1.0)
        factor = clip / weight_or_1
        gradients = jax.tree.map(lambda g: (g.astype(jnp.float32) * factor).astype(g.dtype), gradients)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = transformation.update(gradients, state.opt_state, state.params, finite=finite)
        params = _updated(state.params, updates, lr, _folded(rounding_key, state.step))
        good = finite & _all_finite(params)
        skip = (~good & ~empty).astype(jnp.int32)
        new = TrainState(
            step=state.step + 1,
            params=_where(good, params, state.params),
            opt_state=opt_state,
            skipped=state.skipped + skip,
            streak=jnp.where(good, 0, state.streak + skip),
            loss_scale=scale and _where(empty, scale, scale.after(~overflowed, precision.loss_scaling)),
        )
        metrics = {"loss": total / weight, "grad_norm": norm, "learning_rate": lr, "tokens": weight}
        if isinstance(counted, Counted):
            metrics |= {"loss": counted.nats / weight, "objective": total / weight}
        metrics |= {"loss_scale": scale.value} if scale else {}
        return new, metrics | inspected | {"skipped_steps": new.skipped, "streak": new.streak}

    return train_step


def _all_finite(tree: Tree) -> jax.Array:
    """Whether no element is infinite or NaN: one collective for all leaves together."""
    leaves = jax.tree.leaves(tree)
    axes = jax.sharding.get_abstract_mesh().axis_names

    def local(*shards: jax.Array) -> jax.Array:
        found = functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(shard)) for shard in shards])
        return jax.lax.pmin(found.astype(jnp.int32), axes) == 1

    specs = tuple(jax.typeof(leaf).sharding.spec for leaf in leaves)
    return jax.shard_map(local, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)(*leaves)


def _where(condition: jax.Array, new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _folded(key: jax.Array | None, step: jax.Array) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, step)


def _updated(params: Tree, updates: Tree, lr: jax.Array, rounding_key: jax.Array | None) -> Tree:
    """p - lr u in float32, rounded to the parameters' dtypes: to nearest, or stochastically where there is a key."""
    leaves, structure = jax.tree.flatten(params)
    keys = [None] * len(leaves) if rounding_key is None else list(jax.random.split(rounding_key, len(leaves)))

    def one(p: jax.Array, u: jax.Array, key: jax.Array | None) -> jax.Array:
        new = p.astype(jnp.float32) - lr * u.astype(jnp.float32)
        return new.astype(p.dtype) if key is None or p.dtype == jnp.float32 else stochastic_round(new, key)

    return structure.unflatten(map(one, leaves, structure.flatten_up_to(updates), keys))


def _accumulate(
    loss: Loss, params: Tree, tokens: jax.Array, weights: jax.Array, key: jax.Array | None, scale: jax.Array | None
) -> tuple[jax.Array, jax.Array | Counted, Tree]:
    """Sums of loss, weights (or `Counted`) and gradients over the leading axis of tokens and weights.

    The gradients of one microbatch have their parameters' dtypes, the sum of several is in float32: a sum of many terms
    in bfloat16 would lose what is below a 512th of it.
    """

    def one(tokens: jax.Array, weights: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array | Counted, Tree]:
        micro = None if key is None else jax.random.fold_in(key, index)
        if scale is None:
            (total, weight), gradients = jax.value_and_grad(loss, has_aux=True)(params, tokens, weights, micro)
            return total, weight, gradients
        # It is the mean that is scaled: in float16 a sum over thousands of tokens would overflow by itself. Without a
        # weight there is no mean, and the sum is 0.
        mass = jnp.sum(weights)
        factor = scale / jnp.where(mass == 0, 1.0, mass)

        def scaled(params: Tree) -> tuple[jax.Array, tuple[jax.Array, jax.Array | Counted]]:
            total, weight = loss(params, tokens, weights, micro)
            return total * factor, (total, weight)

        (_, (total, weight)), gradients = jax.value_and_grad(scaled, has_aux=True)(params)
        return total, weight, jax.tree.map(lambda g: (g.astype(jnp.float32) / factor).astype(g.dtype), gradients)

    count = tokens.shape[0]
    if count == 1:
        return one(tokens[0], weights[0], jnp.int32(0))

    def body(sums: Tree, xs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Tree, None]:
        return jax.tree.map(lambda total, x: total + x.astype(jnp.float32), sums, one(*xs)), None

    counted = jax.eval_shape(loss, params, tokens[0], weights[0], key)[1]
    sums = jax.tree.map(lambda _: jnp.float32(0), counted)
    zeros = (jnp.float32(0), sums, jax.tree.map(jnp.zeros_like, summed(params)))
    return jax.lax.scan(body, zeros, (tokens, weights, jnp.arange(count)))[0]


def summed(params: Tree) -> Tree:
    """Shapes, dtypes and shardings of the sum of gradients over several microbatches."""

    def one(p: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = p.sharding if isinstance(p, jax.ShapeDtypeStruct) else jax.typeof(p).sharding
        return jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=sharding)

    return jax.tree.map(one, params)


def make_eval_step(loss: Loss) -> Callable[[Tree, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """step(params, tokens (M, T + 1), weights (M, T)) -> (sum of nats, sum of weights), without dropout.

    The nats are of the next-token loss, whatever `loss` is.
    """

    def eval_step(params: Tree, tokens: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        total, counted = loss(params, tokens, weights, None)
        return (counted.nats, counted.weight) if isinstance(counted, Counted) else (total, counted)

    return eval_step


def global_norm(tree: Tree) -> jax.Array:
    """The Euclidean norm of all leaves together, in float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))
