"""Chunked, sharded cross-entropy against float64 numpy."""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest
import tiny

from meshgpt.distributed.mesh import spec
from meshgpt.errors import UserError
from meshgpt.models.decoder import Head
from meshgpt.objectives.loss import NextToken, cross_entropy, token_log_likelihoods

B, T, D, VOCAB, PADDED = 4, 10, 8, 89, 96


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs of the loss, float32 on the host."""

    x: np.ndarray
    w: np.ndarray
    bias: np.ndarray | None
    targets: np.ndarray
    weights: np.ndarray


def case(biased: bool = True, scale: float = 1.0) -> Case:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) * scale).astype(np.float32)

    weights = rng.random((B, T)).astype(np.float32)
    weights[0, :3] = 0  # masked tokens
    return Case(
        draw(B, T, D), draw(PADDED, D), draw(PADDED) if biased else None, rng.integers(0, VOCAB, (B, T)), weights
    )


def exact(c: Case, z_loss: float) -> tuple[float, tuple[np.ndarray, ...]]:
    """The loss by its formula on all logits, and its gradients by x, w and bias, in float64."""
    x, w, weights = (a.astype(np.float64) for a in (c.x, c.w[:VOCAB], c.weights))
    logits = x @ w.T + (0 if c.bias is None else c.bias[:VOCAB].astype(np.float64))
    top = logits.max(-1, keepdims=True)
    lse = (np.log(np.exp(logits - top).sum(-1, keepdims=True)) + top)[..., 0]
    gold = np.take_along_axis(logits, c.targets[..., None], -1)[..., 0]
    loss = (weights * (lse - gold + z_loss * lse**2)).sum()
    p = np.exp(logits - lse[..., None])
    g = weights[..., None] * (p * (1 + 2 * z_loss * lse)[..., None] - np.eye(VOCAB)[c.targets])
    dw, db = np.zeros(c.w.shape), np.zeros(PADDED)
    dw[:VOCAB], db[:VOCAB] = np.einsum("btv,btd->vd", g, x), g.sum((0, 1))
    return float(loss), (g @ w, dw, db)


def placed(c: Case, dtype: str = "float32") -> tuple[jax.Array, ...]:
    """x, w, bias, targets, weights on the mesh that is set."""
    axes = ("batch seq embed", "vocab_fsdp embed", "vocab", "batch seq", "batch seq")
    arrays = (c.x.astype(dtype), c.w, c.bias, c.targets.astype(np.int32), c.weights)
    return tuple(None if a is None else jax.device_put(a, spec(names)) for a, names in zip(arrays, axes, strict=True))


def ours(c: Case, objective: NextToken, dtype: str = "float32") -> tuple[float, tuple[np.ndarray, ...]]:
    """The loss and gradients on the mesh that is set; the cotangent is 2, so that it is seen to be used."""

    x, w, bias, targets, weights = placed(c, dtype)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1) if bias is None else (0, 1, 2))
    def run(x: jax.Array, w: jax.Array, bias: jax.Array | None) -> jax.Array:
        return 2 * cross_entropy(x, Head(w, bias, VOCAB), targets, weights, objective)

    value, gradients = run(x, w, bias)
    assert [g.dtype.name for g in gradients] == [dtype, "float32", "float32"][: len(gradients)]
    return float(value) / 2, tuple(np.asarray(g, np.float64) / 2 for g in gradients)


def assert_exact(c: Case, objective: NextToken) -> None:
    value, gradients = ours(c, objective)
    expected, by_formula = exact(c, objective.z_loss)
    assert value == pytest.approx(expected, rel=1e-5)
    for got, want in zip(gradients, by_formula, strict=False):
        tiny.assert_close(got, want, 2e-5)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 16, 40, 8192])
def test_value_and_gradients_by_chunks_that_divide_and_that_do_not(chunk_tokens: int) -> None:
    with jax.set_mesh(tiny.mesh()):
        assert_exact(case(), NextToken(chunk_tokens=chunk_tokens))


@pytest.mark.parametrize("biased", [True, False])
def test_z_loss_equals_its_formula(biased: bool) -> None:
    with jax.set_mesh(tiny.mesh()):
        assert_exact(case(biased, scale=2.0), NextToken(z_loss=0.1, chunk_tokens=16))


@pytest.mark.parametrize("mesh", [(4, 1, 1), (1, 4, 1), (1, 1, 8), (2, 2, 2)])
def test_value_and_gradients_on_any_mesh(mesh: tuple[int, int, int]) -> None:
    with jax.set_mesh(tiny.mesh(*mesh)):
        assert_exact(case(), NextToken(z_loss=0.01, chunk_tokens=6))


def test_large_logits_do_not_overflow() -> None:
    with jax.set_mesh(tiny.mesh()):
        assert_exact(case(scale=12.0), NextToken())


def test_padding_takes_no_part_whatever_it_holds() -> None:
    c = case()
    loud = dataclasses.replace(c, w=np.concatenate([c.w[:VOCAB], np.full((PADDED - VOCAB, D), 50, np.float32)]))
    with jax.set_mesh(tiny.mesh(1, 1, 2)):
        (value, gradients), (again, others) = ours(c, NextToken()), ours(loud, NextToken())
    assert value == again
    for got, other in zip(gradients, others, strict=True):
        np.testing.assert_array_equal(got, other)
    assert (gradients[1][VOCAB:] == 0).all()
    assert (gradients[2][VOCAB:] == 0).all()


def test_16_bit_hidden_states_cost_little_accuracy() -> None:
    c = case()
    with jax.set_mesh(tiny.mesh()):
        value, gradients = ours(c, NextToken(), "bfloat16")
    expected, by_formula = exact(c, 0.0)
    assert value == pytest.approx(expected, rel=2e-2)
    for got, want in zip(gradients, by_formula, strict=True):
        tiny.assert_close(got, want, 3e-2)


def test_evaluation_computes_the_same_loss() -> None:
    c = case()
    with jax.set_mesh(tiny.mesh()):
        x, w, bias, targets, weights = placed(c)
        value = cross_entropy(x, Head(w, bias, VOCAB), targets, weights, NextToken())
    assert float(value) == pytest.approx(exact(c, 0.0)[0], rel=1e-5)


def _largest_tensor(chunk_tokens: int) -> int:
    """Elements of the largest array in the optimized program of the loss and its gradients."""
    b, t, d, v = 2, 64, 4, 1024
    zeros = np.zeros((b, t), np.float32)
    c = Case(np.zeros((b, t, d), np.float32), np.zeros((v, d), np.float32), None, zeros, zeros)
    with jax.set_mesh(tiny.mesh()):
        x, w, _, targets, weights = placed(c)

        @functools.partial(jax.value_and_grad, argnums=(0, 1))
        def loss(x: jax.Array, w: jax.Array) -> jax.Array:
            return cross_entropy(x, Head(w, None, v), targets, weights, NextToken(chunk_tokens=chunk_tokens))

        program = jax.jit(loss).lower(x, w).compile()
    shapes = re.findall(r"(?:f32|bf16|pred|s32|f16)\[([\d,]+)\]", program.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_no_tensor_of_the_logits_size_exists_in_the_compiled_program() -> None:
    assert _largest_tensor(8192) >= 2 * 64 * 1024, "the search finds logits where they are whole"
    assert _largest_tensor(16) <= 16 * 1024


@pytest.mark.parametrize("chunk_tokens", [0, -1])
def test_a_chunk_of_no_tokens_is_refused(chunk_tokens: int) -> None:
    with pytest.raises(UserError, match=rf"chunk_tokens={chunk_tokens}"):
        NextToken(chunk_tokens=chunk_tokens)


def test_a_negative_z_loss_is_refused() -> None:
    with pytest.raises(UserError, match=r"z_loss=-0\.1"):
        NextToken(z_loss=-0.1)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("chunk_tokens", [7, 8192])
def test_log_likelihood_of_each_token_by_formula(mesh: tuple[int, int, int], chunk_tokens: int) -> None:
    c = case(scale=1.5)
    logits = c.x.astype(np.float64) @ c.w[:VOCAB].T.astype(np.float64) + c.bias[:VOCAB]
    c.targets[:, ::2] = logits.argmax(-1)[:, ::2]
    expected = np.take_along_axis(logits, c.targets[..., None], -1)[..., 0] - np.log(np.exp(logits).sum(-1))
    with jax.set_mesh(tiny.mesh(*mesh)):
        x, w, bias, targets, _ = placed(c)
        got, greedy = jax.jit(lambda x, w, b, t: token_log_likelihoods(x, Head(w, b, VOCAB), t, chunk_tokens))(
            x, w, bias, targets
        )
    tiny.assert_close(got, expected, 1e-5)
    np.testing.assert_array_equal(np.asarray(greedy), logits.argmax(-1) == c.targets)


def test_of_equally_likely_tokens_the_first_is_the_likeliest() -> None:
    c = case(biased=False)
    c.w[:] = c.w[:1]
    with jax.set_mesh(tiny.mesh(1, 1, 4)):
        x, w, *_ = placed(c)
        targets = jax.device_put(np.tile([0, 1], (B, T // 2)).astype(np.int32), spec("batch seq"))
        greedy = token_log_likelihoods(x, Head(w, None, VOCAB), targets)[1]
    np.testing.assert_array_equal(np.asarray(greedy), np.tile([True, False], (B, T // 2)))
