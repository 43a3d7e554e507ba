"""Losses of next-token logits that never hold these for a whole batch.

Cross-entropy is here, `distillation` has the loss beside a teacher.

Each device computes the logits of its own tokens and its own slice of the vocabulary, a chunk of tokens at a time, and
the gradient with respect to hidden states and head in the same pass (they are products of the logits, which are then
gone). The vocabulary's padding takes no part.

Legend: B batch, T tokens, D d_model, V padded vocabulary; on one device b tokens rows, c tokens of a chunk, v
vocabulary slice.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from meshgpt.distributed.mesh import spec
from meshgpt.errors import UserError
from meshgpt.models.decoder import Head
from meshgpt.models.model import Model, ModelConfig
from meshgpt.settings import settings
from meshgpt.trees import Tree

BATCH_AXES = ("data", "fsdp")


class Counted(NamedTuple):
    """Sums that belong to an objective which is more than the next-token loss.

    weight: of the tokens' weights. nats: of the next-token loss alone, which validation and other runs compare with.
    """

    weight: jax.Array
    nats: jax.Array


# loss(params, tokens (M, T + 1), weights (M, T), key) -> (sum over tokens, sum of weights). Sums, never means: adding
# up microbatches, uneven rows or hosts then cannot change the answer. An objective that is not the next-token loss
# itself gives `Counted` in the place of the sum of weights.
Loss: TypeAlias = Callable[[Tree, jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array | Counted]]


class Scored(NamedTuple):
    """Of some tokens: the objective's sum, its gradient with respect to the logits, and the sum of the next-token loss.

    All float32. nats: None where the objective is the next-token loss itself.
    """

    total: jax.Array
    slope: jax.Array
    nats: jax.Array | None = None


class LogitObjective(Protocol):
    """What is summed over tokens, given logits of some of them against a device's slice of the vocabulary.

    Devices along `tensor` hold the other slices. chunk_tokens: tokens whose logits one device holds at a time.
    plain: the next-token loss; an objective that equals its own `plain` reports no `nats` apart.
    """

    @property
    def chunk_tokens(self) -> int: ...

    @property
    def plain(self) -> "LogitObjective": ...

    def score(
        self, student_logits: jax.Array, is_target: jax.Array, weights_bc: jax.Array, teacher_logits: jax.Array | None
    ) -> Scored:
        """The sums of some tokens.

        Args:
          student_logits: (b, c, v) float32, -inf where the vocabulary is padding.
          is_target: (b, c, v), whether an id is the target.
          teacher_logits: those of a frozen model, where there is one.
        """
        ...


@settings("objective")
class NextToken:
    """The next-token objective."""

    z_loss: float = 0.0
    """Weight of logsumexp(logits)^2 in the training loss, which keeps the softmax's normaliser near 1; GPT-J took 1e-4
    (PaLM, Chowdhery et al. 2022, section 5)."""
    chunk_tokens: int = 8192
    """Number of tokens whose logits one device holds at a time."""

    def __post_init__(self) -> None:
        if self.z_loss < 0 or self.chunk_tokens < 1:
            raise UserError(
                f"objective.z_loss={self.z_loss}, objective.chunk_tokens={self.chunk_tokens}: "
                "the first must not be negative, the second at least 1"
            )

    @property
    def plain(self) -> "NextToken":
        """What validation reports: without regularisers."""
        return dataclasses.replace(self, z_loss=0.0)

    def abstract_frozen(self, model: Model) -> Tree:
        """What the loss reads beside `model`'s parameters: nothing."""
        del model
        return {}

    def loss(self, model: Model, frozen: Tree, document_end: int | None) -> Loss:
        """The loss of `model`, whatever a run reads beside it."""
        del frozen
        return next_token_loss(model, self, document_end)

    def flops_beside(self, student: ModelConfig, seq_len: int) -> int:
        """Floating-point operations a token of other models than the one that is trained: none."""
        del student, seq_len
        return 0

    def score(
        self, student_logits: jax.Array, is_target: jax.Array, weights_bc: jax.Array, teacher_logits: jax.Array | None
    ) -> Scored:
        """weight * (logsumexp(logits) - logits[target] + z_loss * logsumexp(logits)^2), summed, and its gradient."""
        del teacher_logits
        softmax = Softmax.of(student_logits)
        gold = jax.lax.psum(jnp.where(is_target, student_logits, 0.0).sum(-1), "tensor")
        total = jnp.sum(weights_bc * (softmax.logsumexp - gold + self.z_loss * jnp.square(softmax.logsumexp)))
        slope = weights_bc * (1.0 + 2.0 * self.z_loss * softmax.logsumexp) / softmax.normaliser
        gradient = softmax.exp * slope[..., None] - jnp.where(is_target, weights_bc[..., None], 0.0)
        nats = jnp.sum(weights_bc * (softmax.logsumexp - gold)) if self.z_loss else None
        return Scored(total, gradient, nats)


class Softmax(NamedTuple):
    """A softmax over a vocabulary in slices: probabilities are exp / normaliser, exp (b, c, v), the others (b, c)."""

    exp: jax.Array
    normaliser: jax.Array
    logsumexp: jax.Array

    @staticmethod
    def of(logits: jax.Array) -> "Softmax":
        top = jax.lax.pmax(logits.max(-1), "tensor")
        exp = jnp.exp(logits - top[..., None])
        normaliser = jax.lax.psum(exp.sum(-1), "tensor")
        return Softmax(exp, normaliser, jnp.log(normaliser) + top)


class Teacher(NamedTuple):
    """A frozen model's hidden states (B, T, E) and its head; its vocabulary is padded as the student's."""

    x_BTE: jax.Array
    head: Head


class _Gradients(NamedTuple):
    """Gradients, or in their places how they lie on the mesh."""

    x_BTD: Any
    weight_VD: Any
    bias_V: Any


class _Totals(NamedTuple):
    """Sums over chunks; nats as in `Scored`; the gradients of weight and bias where they are asked for."""

    loss: jax.Array
    nats: jax.Array | None
    weight_vD: jax.Array | None
    bias_v: jax.Array | None


def next_token_loss(model: Model, objective: NextToken, document_end: int | None = None) -> Loss:
    """The loss of predicting each row's next token; `document_end` as `Decoder.hidden` takes it."""

    def loss(params: Tree, tokens: jax.Array, weights: jax.Array, key: jax.Array | None) -> tuple:
        decoder = model.bind(params)
        x_MTD = decoder.hidden(tokens[:, :-1], key, document_end)
        total, nats = summed(x_MTD, decoder.head(), tokens[:, 1:], weights, objective)
        weight = jnp.sum(weights)
        return total, weight if nats is None else Counted(weight, nats)

    return loss


def cross_entropy(
    x_BTD: jax.Array, head: Head, targets_BT: jax.Array, weights_BT: jax.Array, objective: NextToken
) -> jax.Array:
    """sum over tokens of weight * (logsumexp(logits) - logits[target] + z_loss * logsumexp(logits)^2), a scalar.

    A sum and not a mean, so that accumulation, packing and uneven hosts cannot change the answer: the caller divides
    by the sum of the weights. Differentiable in x, the head's weight and its bias.
    """
    return summed(x_BTD, head, targets_BT, weights_BT, objective)[0]


def summed(
    x_BTD: jax.Array,
    head: Head,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    objective: LogitObjective,
    teacher: Teacher | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """What `objective` scores, summed over tokens, and the next-token loss in it (`Scored.nats`).

    The first is differentiable in x, the head's weight and its bias alone; the second not at all.
    """
    sizes, frozen = (head.vocab_size, None), None
    if teacher is not None:
        sizes = head.vocab_size, teacher.head.vocab_size
        frozen = teacher.x_BTE, teacher.head.weight_VD, teacher.head.bias_V
    return _summed(sizes, objective, x_BTD, head.weight_VD, head.bias_V, frozen, targets_BT, weights_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(sizes, objective, x_BTD, weight_VD, bias_V, frozen, targets_BT, weights_BT):
    return _sharded(sizes, objective, x_BTD, weight_VD, bias_V, frozen, targets_BT, weights_BT, False)[0]


def _forward(sizes, objective, x_BTD, weight_VD, bias_V, frozen, targets_BT, weights_BT):
    return _sharded(sizes, objective, x_BTD, weight_VD, bias_V, frozen, targets_BT, weights_BT, True)


def _backward(sizes, objective, gradients: _Gradients, cotangents: tuple[jax.Array, jax.Array | None]):
    scaled = jax.tree.map(lambda g: g * cotangents[0].astype(g.dtype), gradients)
    return scaled.x_BTD, scaled.weight_VD, scaled.bias_V, None, None, None


_summed.defvjp(_forward, _backward)


def _sharded(
    sizes: tuple[int, int | None],
    objective: LogitObjective,
    x_BTD,
    weight_VD,
    bias_V,
    frozen,
    targets_BT,
    weights_BT,
    differentiate: bool,
) -> tuple[tuple[jax.Array, jax.Array | None], _Gradients | None]:
    """The sums, and the gradients of the first if asked for, of arrays on the mesh."""
    x_spec, table, vocab, rows = spec("batch seq embed"), spec("vocab_fsdp embed"), spec("vocab"), spec("batch seq")
    bias_spec = None if bias_V is None else vocab
    frozen_specs = None if frozen is None else (x_spec, table, None if frozen[2] is None else vocab)
    gradient_specs = _Gradients(x_spec, table, bias_spec) if differentiate else None
    local = functools.partial(_local, sizes, objective, differentiate)
    sums = PartitionSpec(), None if objective == objective.plain else PartitionSpec()
    return jax.shard_map(
        local,
        in_specs=(x_spec, table, bias_spec, frozen_specs, rows, rows),
        out_specs=(sums, gradient_specs),
        check_vma=False,
    )(x_BTD, weight_VD, bias_V, frozen, targets_BT, weights_BT)


def _local(sizes, objective, differentiate, x_bTD, weight_shard, bias_v, frozen, targets_bT, weights_bT):
    """What one device does: chunks of its tokens against its slice of the vocabulary."""
    w_vD, ids_v = _vocabulary(weight_shard, x_bTD.dtype)
    taught, rest = None, None
    if frozen is not None:
        rest, shard, bias = frozen
        taught = functools.partial(_logits, sizes[1], _vocabulary(shard, rest.dtype)[0], bias, ids_v)
    own = functools.partial(_logits, sizes[0], w_vD, bias_v, ids_v)
    chunk = functools.partial(_chunk, objective, differentiate, w_vD, ids_v, own, taught)
    xs = jax.tree.map(lambda a: _split(a, objective.chunk_tokens), (x_bTD, rest, targets_bT, weights_bT))
    zeros = _Totals(
        loss=jnp.zeros((), jnp.float32),
        nats=None if objective == objective.plain else jnp.zeros((), jnp.float32),
        weight_vD=jnp.zeros(w_vD.shape, jnp.float32) if differentiate else None,
        bias_v=jnp.zeros(bias_v.shape, jnp.float32) if differentiate and bias_v is not None else None,
    )
    if xs[0].shape[0] == 1:
        totals, dx = chunk(zeros, jax.tree.map(lambda a: a[0], xs))
        dx = None if dx is None else dx[None]
    else:
        totals, dx = jax.lax.scan(chunk, zeros, xs)
    sums = jax.lax.psum((totals.loss, totals.nats), BATCH_AXES)
    if dx is None:
        return sums, None
    dx_bTD = jnp.moveaxis(dx, 0, 1).reshape(x_bTD.shape[0], -1, x_bTD.shape[2])[:, : x_bTD.shape[1]]
    dw: Any = totals.weight_vD
    if jax.lax.axis_size("data") > 1:  # of one device XLA's CPU backend makes a copy, here as large as the head
        dw = jax.lax.psum(dw, "data")
    if jax.lax.axis_size("fsdp") > 1:
        dw = jax.lax.psum_scatter(dw, "fsdp", tiled=True)
    db = None if bias_v is None else jax.lax.psum(totals.bias_v, BATCH_AXES).astype(bias_v.dtype)
    return sums, _Gradients(dx_bTD, dw.astype(weight_shard.dtype), db)


def token_log_likelihoods(
    x_BTD: jax.Array,
    head: Head,
    targets_BT: jax.Array,
    chunk_tokens: int = NextToken.chunk_tokens,
    allowed_V: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(log p(target), whether the target is the likeliest token, of equals the first) of each token.

    float32 and bool (B, T), of hidden states (B, T, D) and targets (B, T). A device holds the logits of `chunk_tokens`
    tokens at a time. `allowed_V` are the tokens that may be the likeliest, None for all; probabilities are over all.
    """
    rows, vocabulary = spec("batch seq"), spec("vocab")
    allowed_V = None if allowed_V is None else jax.sharding.reshard(allowed_V, vocabulary)
    score = jax.shard_map(
        functools.partial(_local_scores, head.vocab_size, chunk_tokens),
        in_specs=(
            spec("batch seq embed"),
            spec("vocab_fsdp embed"),
            None if head.bias_V is None else vocabulary,
            None if allowed_V is None else vocabulary,
            rows,
        ),
        out_specs=(rows, rows),
        check_vma=False,
    )
    log_likelihood_BT, greedy_BT = score(x_BTD, head.weight_VD, head.bias_V, allowed_V, targets_BT)
    return log_likelihood_BT, greedy_BT


def _local_scores(vocab_size, chunk_tokens, x_bTD, weight_shard, bias_v, allowed_v, targets_bT):
    """`token_log_likelihoods` of one device's tokens."""
    w_vD, ids_v = _vocabulary(weight_shard, x_bTD.dtype)

    def chunk(_, xs):
        x_bcD, targets_bc = xs
        logits = _logits(vocab_size, w_vD, bias_v, ids_v, x_bcD)
        top = jax.lax.pmax(logits.max(-1), "tensor")
        normaliser = jax.lax.psum(jnp.exp(logits - top[..., None]).sum(-1), "tensor")
        gold = jax.lax.psum(jnp.where(ids_v[None, None] == targets_bc[..., None], logits, 0.0).sum(-1), "tensor")
        if allowed_v is None:
            best = top
        else:
            logits = jnp.where(allowed_v[None, None], logits, -jnp.inf)
            best = jax.lax.pmax(logits.max(-1), "tensor")
        ids_bcv = jnp.where(logits == best[..., None], ids_v[None, None], jnp.iinfo(jnp.int32).max)
        first = jax.lax.pmin(ids_bcv.min(-1), "tensor")
        return None, (gold - top - jnp.log(normaliser), first == targets_bc)

    _, scores = jax.lax.scan(chunk, None, tuple(_split(a, chunk_tokens) for a in (x_bTD, targets_bT)))
    length = targets_bT.shape[1]
    return tuple(jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1)[:, :length] for a in scores)


def _vocabulary(weight_shard: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """(w_vD in the compute dtype, ids_v): a device's slice of the vocabulary, gathered over `fsdp`."""
    w_vD = weight_shard.astype(dtype)
    if jax.lax.axis_size("fsdp") > 1:
        w_vD = jax.lax.all_gather(w_vD, "fsdp", tiled=True)
    return w_vD, jax.lax.axis_index("tensor") * w_vD.shape[0] + jnp.arange(w_vD.shape[0])


def _logits(vocab_size, w_vD, bias_v, ids_v, x_bcD):
    """float32 logits of a chunk against a slice of the vocabulary; those of its padding are -inf."""
    logits = jnp.einsum("bcD,vD->bcv", x_bcD, w_vD, preferred_element_type=jnp.float32)
    if bias_v is not None:
        logits = logits + bias_v.astype(jnp.float32)[None, None]
    return jnp.where((ids_v < vocab_size)[None, None], logits, -jnp.inf)


def _split(a_bT: jax.Array, chunk_tokens: int) -> jax.Array:
    """(b, T, ...) to (chunks, b, c, ...), T padded with zeros (which weigh nothing) where c does not divide it."""
    b, length = a_bT.shape[:2]
    chunks = max(1, min(length, -(-b * length // chunk_tokens)))
    c = -(-length // chunks)
    padded = jnp.pad(a_bT, ((0, 0), (0, chunks * c - length)) + ((0, 0),) * (a_bT.ndim - 2))
    return jnp.moveaxis(padded.reshape(b, chunks, c, *a_bT.shape[2:]), 1, 0)


def _chunk(objective, differentiate, w_vD, ids_v, own, taught, totals, xs):
    """Adds one chunk's loss (and gradients) to the totals; gives the gradient of its hidden states."""
    x_bcD, x_bcE, targets_bc, weights_bc = xs
    is_target = ids_v[None, None] == targets_bc[..., None]
    total, g, nats = objective.score(own(x_bcD), is_target, weights_bc, None if taught is None else taught(x_bcE))
    loss = totals.loss + total
    nats = None if totals.nats is None else totals.nats + nats
    if not differentiate:
        return _Totals(loss, nats, None, None), None
    db = None if totals.bias_v is None else totals.bias_v + g.sum((0, 1))
    g = g.astype(x_bcD.dtype)
    dw = totals.weight_vD + _outer(g, x_bcD)
    dx = jax.lax.psum(jnp.einsum("bcv,vD->bcD", g, w_vD, preferred_element_type=jnp.float32), "tensor")
    return _Totals(loss, nats, dw, db), dx.astype(x_bcD.dtype)


def _outer(g: jax.Array, x_bcD: jax.Array) -> jax.Array:
    """The gradient of the head's weight, (v, D) float32."""
    if g.dtype == jnp.float32:
        # XLA's CPU backend transposes the first operand by a copy, and g is by far the larger. In 16 bits it has no
        # matmul this way round.
        return jnp.einsum("bcD,bcv->Dv", x_bcD, g).T
    return jnp.einsum("bcv,bcD->vD", g, x_bcD, preferred_element_type=jnp.float32)
