"""The parts of a block against PyTorch and transformers, and the ways to run a stack of them against each other."""

import dataclasses
import functools
import itertools
import math
import re
from types import ModuleType

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.nn.initializers import normal, zeros

from meshgpt.distributed.mesh import spec
from meshgpt.errors import UserError
from meshgpt.models import attention_kernels, layers
from meshgpt.models.layers import Execution
from meshgpt.models.scan import OfLayer, run_stack

F32 = jnp.dtype("float32")


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("spread", [1.0, 1e-3, 100.0])
def test_layer_norm_equals_pytorch_in_values_and_gradients(torch: ModuleType, spread: float) -> None:
    x, y = (draw(2, 3, 8) + 2) * spread, draw(2, 3, 8, seed=1)
    theirs = torch.nn.LayerNorm(8, eps=1e-5)
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(draw(8, seed=2)))
        theirs.bias.copy_(torch.from_numpy(draw(8, seed=3)))
    input_ = torch.from_numpy(x).requires_grad_()
    (theirs(input_) * torch.from_numpy(y)).sum().backward()
    with jax.set_mesh(tiny.mesh()):

        def weighed(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
            norm = layers.LayerNorm(8, 1e-5, F32)
            norm.scale_D.set_value(scale)
            norm.bias_D.set_value(bias)
            return (norm(x) * y).sum()

        ours = jax.grad(weighed, (0, 1, 2))(
            *(jnp.asarray(a.detach().numpy()) for a in (input_, theirs.weight, theirs.bias))
        )
    for gradient, parameter in zip(ours, (input_, theirs.weight, theirs.bias), strict=True):
        tiny.assert_close(gradient, parameter.grad.numpy(), 1e-4)


def test_layer_norm_of_16_bits_computes_in_32() -> None:
    x = jnp.asarray(draw(1, 2, 64) + 30, jnp.bfloat16)
    with jax.set_mesh(tiny.mesh()):
        y = layers.LayerNorm(64, 1e-5, F32)(x)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-5)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, atol=2**-7, rtol=2**-7)


def test_mlp_is_gelu_new_between_two_matmuls(torch: ModuleType) -> None:
    x = draw(2, 3, 4)
    with jax.set_mesh(tiny.mesh()):
        mlp = layers.MLP(4, 6, normal(1.0), normal(1.0), F32, nnx.Rngs(0))
        mlp.up_bias_F.set_value(jnp.asarray(draw(6)))
        mlp.down_bias_D.set_value(jnp.asarray(draw(4)))
        ours = mlp(jnp.asarray(x))
    up, up_bias, down, down_bias = (
        torch.tensor(np.asarray(w.get_value())) for w in (mlp.up_DF, mlp.up_bias_F, mlp.down_FD, mlp.down_bias_D)
    )
    hidden = torch.nn.functional.gelu(torch.from_numpy(x) @ up + up_bias, approximate="tanh")
    np.testing.assert_allclose(ours, (hidden @ down + down_bias).numpy(), atol=1e-5)


@pytest.mark.parametrize(("head", "dims"), [(8, 8), (8, 4), (6, 2)])
def test_rotary_embedding_equals_transformers(torch: ModuleType, head: int, dims: int) -> None:
    from transformers.models.gptj import modeling_gptj

    x = draw(2, 5, 3, head)
    positions = np.array([[0, 1, 2, 3, 4], [7, 8, 900, 901, 2000]])
    theirs = modeling_gptj.create_sinusoidal_positions(2048, dims)[torch.from_numpy(positions)]
    sin, cos = theirs.chunk(2, dim=-1)
    turned = modeling_gptj.apply_rotary_pos_emb(torch.from_numpy(x[..., :dims]), sin, cos).numpy()
    with jax.set_mesh(tiny.mesh()):
        ours = layers.rotate(
            jax.device_put(x, spec("batch seq heads _")), layers.rotary_table(jnp.asarray(positions), dims)
        )
    np.testing.assert_allclose(ours[..., :dims], turned, atol=2e-4)  # at position 2000 an ulp of the angle is 1e-4
    np.testing.assert_array_equal(ours[..., dims:], x[..., dims:])


def test_rotary_scores_depend_on_the_distance_only() -> None:
    q, k = jnp.asarray(draw(1, 1, 1, 8)), jnp.asarray(draw(1, 1, 1, 8, seed=1))

    def score(at: int, seen: int) -> jax.Array:
        def turn(x: jax.Array, position: int) -> jax.Array:
            return layers.rotate(x, layers.rotary_table(jnp.full((1, 1), position), 8))

        return (turn(q, at) * turn(k, seen)).sum()

    with jax.set_mesh(tiny.mesh()):
        np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=1e-4)
        assert abs(score(9, 4) - score(4, 9)) > 1e-2


def test_attention_equals_pytorch_under_any_mask(torch: ModuleType) -> None:
    q, k, v = draw(2, 3, 2, 4), draw(2, 5, 2, 4, seed=1), draw(2, 5, 2, 4, seed=2)
    mask = np.random.default_rng(0).random((2, 3, 5)) < 0.6
    mask[..., 0] = True
    ours = layers.attend(*(jnp.asarray(a) for a in (q, k, v, mask)))
    heads_first = [torch.from_numpy(a).transpose(1, 2) for a in (q, k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=torch.from_numpy(mask)[:, None])
    np.testing.assert_allclose(ours, theirs.transpose(1, 2).numpy(), atol=1e-5)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_zeroes_its_share_and_keeps_the_mean(rate: float) -> None:
    x = jnp.ones((400, 500), jnp.float32)
    with jax.set_mesh(tiny.mesh()):
        y = np.asarray(layers.dropout(x, rate, jax.random.key(0)))
        np.testing.assert_array_equal(y, layers.dropout(x, rate, jax.random.key(0)))
        assert (y != np.asarray(layers.dropout(x, rate, jax.random.key(1)))).any()
    sigma = math.sqrt(rate * (1 - rate) / y.size)
    assert abs((y == 0).mean() - rate) < 5 * sigma
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-6)
    assert abs(y.mean() - 1) < 5 * sigma / (1 - rate)


def test_dropout_is_the_identity_without_a_key_or_a_rate() -> None:
    x = jnp.ones((3,), jnp.float32)
    assert layers.dropout(x, 0.5, None) is x
    assert layers.dropout(x, 0.0, jax.random.key(0)) is x


class Quantized:
    """A parameter that is not an array: half its value, doubled at use."""

    def __init__(self, half: jax.Array):
        self.half = half

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        return (self.half * 2).astype(dtype)


def test_a_weight_may_be_more_than_an_array() -> None:
    x, w = jnp.asarray(draw(2, 3, 4)), jnp.asarray(draw(4, 6))
    with jax.set_mesh(tiny.mesh()):
        plain = layers.einsum("BTD,DF->BTF", x, nnx.Param(w, axes="fsdp mlp"), "batch seq mlp")
        other = layers.einsum("BTD,DF->BTF", x, nnx.Param(Quantized(w / 2), axes="fsdp mlp"), "batch seq mlp")
    np.testing.assert_array_equal(plain, other)


def test_parameters_start_as_their_initialiser_says_and_lie_as_their_axes_say() -> None:
    with jax.set_mesh(tiny.mesh(1, 2, 4)):
        p = layers.param(jax.random.key(0), (8, 8), "fsdp mlp", zeros, F32)
        assert p.get_value().sharding.spec == spec("fsdp mlp")
        assert (np.asarray(p.get_value()) == 0).all()
        assert layers.weight(p, jnp.dtype("bfloat16")).dtype == jnp.bfloat16
        assert jax.typeof(layers.weight(p, F32)).sharding.spec == spec("_ mlp")


def test_attention_by_cudnn_is_causal_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent to cuDNN says so: without the mask a GPU would train on the tokens that it is to predict."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_compute_capability", lambda asked: True)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    with jax.set_mesh(tiny.mesh()):
        heads = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec("batch seq heads _"))
        x = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16, sharding=heads)

        def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attention_kernels.attend_fused("cudnn", q, k, v).astype(jnp.float32).sum()

        gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(x, x, x).lower(lowering_platforms=("cuda",))
    calls = [line for line in gradient.as_text().splitlines() if "__cudnn$fmha" in line]
    assert [line.split("__cudnn$")[1].split("(")[0] for line in calls] == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
    for line in calls:
        assert re.search(r"mask_type\\22: \\22CAUSAL\\22", line), line


def test_cudnn_is_refused_with_the_reason_where_it_cannot_run() -> None:
    assert layers.pick_kernel("auto", F32, 64) == "xla"
    assert layers.pick_kernel("xla", F32, 64) == "xla"
    with pytest.raises(UserError, match=r"execution.attention='cudnn'.*the backend is cpu.*'auto' or 'xla'"):
        layers.pick_kernel("cudnn", jnp.dtype("bfloat16"), 64)


def test_a_negative_unroll_is_refused() -> None:
    with pytest.raises(UserError, match=r"execution.unroll=-1"):
        Execution(unroll=-1)


DEEP = dataclasses.replace(tiny.GPT2, n_layers=3, n_heads=2)
WAYS = [(unroll, remat) for remat in ("none", "full", "dots", "named") for unroll in (1, 0)] + [(2, "none")]


def _value_and_gradients(unroll: int, remat: layers.Remat, key: jax.Array | None) -> tuple[jax.Array, dict]:
    model = tiny.model(DEEP, Execution(unroll=unroll, remat=remat))

    @jax.jit
    def run(params: dict) -> tuple[jax.Array, dict]:
        def weighed(params: dict) -> jax.Array:
            return (model.bind(params).hidden(jnp.asarray(tiny.tokens(2, 5)), key) * draw(2, 5, DEEP.d_model)).sum()

        return jax.value_and_grad(weighed)(params)

    value, gradients = run(tiny.params(DEEP))
    return value, tiny.to_numpy(gradients)


def test_every_way_to_run_the_stack_computes_the_same() -> None:
    with jax.set_mesh(tiny.mesh()):
        value, gradients = _value_and_gradients(*WAYS[0], None)
        for way in WAYS[1:]:
            other, others = _value_and_gradients(*way, None)
            np.testing.assert_allclose(other, value, rtol=1e-5, err_msg=str(way))
            for name, gradient in gradients.items():
                # The gradient of a bias of keys is zero but for rounding.
                atol = 1e-5 * max(np.abs(gradient).max(), 0.01)
                np.testing.assert_allclose(others[name], gradient, rtol=0, atol=atol, err_msg=f"{way} {name}")


def _matmuls_in_gradient(remat: layers.Remat) -> int:
    model = tiny.model(DEEP, Execution(unroll=0, remat=remat))
    tokens = jnp.asarray(tiny.tokens(2, 5))
    gradient = jax.make_jaxpr(jax.grad(lambda p: model.bind(p).hidden(tokens).sum()))(model.abstract_params())
    return _matmuls(gradient.jaxpr)


def _matmuls(jaxpr: jex.core.Jaxpr) -> int:
    inner = [sub for equation in jaxpr.eqns for sub in jex.core.jaxprs_in_params(equation.params)]
    return sum(e.primitive.name == "dot_general" for e in jaxpr.eqns) + sum(map(_matmuls, inner))


def test_policies_recompute_what_they_say() -> None:
    """A block has 8 matmuls forward: q, k, v, scores, values, o, up, down; the backward pass has two for each."""
    with jax.set_mesh(tiny.mesh()):
        assert _matmuls_in_gradient("none") == 3 * 24
        # Kept: all but the two without a weight. `named` keeps attention, but needs its scores for their gradient.
        assert _matmuls_in_gradient("dots") == 3 * (24 + 2)
        assert _matmuls_in_gradient("named") == 3 * (24 + 2)
        # Of a whole block only the last matmul is not needed again.
        assert _matmuls_in_gradient("full") == 3 * (24 + 7)


def test_layers_drop_different_things() -> None:
    x = jnp.ones((1, 1, 1000), jnp.float32)
    seen = []

    def block(one: jax.Array, x: jax.Array, of_layer: OfLayer) -> jax.Array:
        seen.append(layers.dropout(x, 0.5, of_layer.key))
        return x

    run_stack(block, jnp.zeros((3, 1)), x, jax.random.key(0), 3, Execution(unroll=0))
    assert all((a != b).any() for a, b in itertools.pairwise(seen))


def test_splash_stops_at_the_ends_of_documents():
    """The TPU's kernel, interpreted on the CPU, against the scores written out: values and gradients."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d = (jax.random.normal(key, (2, 256, 2, 64)) for key in keys)
    segments_BT = jnp.stack([jnp.arange(256) // 100, jnp.arange(256) // 31]).astype(jnp.int32)
    slots_S = jnp.arange(256)
    causal = slots_S[None, None] <= slots_S[None, :, None]
    mask_BTS = causal & (segments_BT[:, :, None] == segments_BT[:, None, :])

    def fused(q, k, v):
        return jnp.sum(d * attention_kernels.splash(q, k, v, segments_BT, interpret=True))

    def written_out(q, k, v):
        return jnp.sum(d * layers.attend(q, k, v, mask_BTS))

    ours = jax.value_and_grad(fused, argnums=(0, 1, 2))(q, k, v)
    oracle = jax.value_and_grad(written_out, argnums=(0, 1, 2))(q, k, v)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4), ours, oracle)
