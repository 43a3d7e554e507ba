"""The parts both families are made of: norm, rotary embedding, causal attention with a cache, the stack of blocks.

Legend: B batch, T query tokens, S key tokens (the cache's length, or T), L layers, D d_model, N heads, H head size,
F d_ff, R rotary dimensions, V padded vocabulary.
"""

import dataclasses
import functools
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import Initializer, zeros

from meshgpt.distributed.mesh import gathered, spec
from meshgpt.errors import UserError
from meshgpt.models.attention_kernels import Kernel, attend_fused, pick_kernel
from meshgpt.models.kv_cache import LayerCache, Slots, attend_cached
from meshgpt.settings import settings

Remat = Literal["none", "full", "dots", "named", "offload"]

# Activations worth keeping under remat="named": those whose recomputation costs a matmul or attention.
SAVED_NAMES = ("q", "k", "v", "attention", "mlp_up")


@settings("execution")
class Execution:
    """How the layers run; never what they compute.

    A scan over layers compiles once for any depth, which is what deep models and pods want.
    """

    unroll: int = 1
    """Number of layers in an iteration of the scan over layers; 0 runs all of them in line, which makes faster steps (a
    quarter at GPT-2 124M on an H200, see docs/performance.md) for a compile time and a program that grow with depth."""
    remat: Remat = "none"
    """What the backward pass recomputes rather than keeps: `none` keeps every activation, `dots` the results of
    matmuls, `named` q, k, v, attention and the MLP's input matmul, `offload` the same in the host's memory, `full` only
    each block's input."""
    attention: Kernel = "auto"
    """Attention kernel: `xla` writes out the scores of all pairs of tokens, `cudnn` is cuDNN's fused attention (GPU,
    16-bit), `splash` is a kernel for TPU v4 and later, and `auto` takes the fused one that can run."""

    def __post_init__(self) -> None:
        if self.unroll < 0:
            raise UserError(f"execution.unroll={self.unroll}: give layers per iteration, or 0 for all")


@runtime_checkable
class Weight(Protocol):
    """A parameter that is not a plain array: low-rank, quantized. `dense` gives what the matmul uses."""

    def dense(self, dtype: jnp.dtype) -> jax.Array: ...


@runtime_checkable
class Product(Protocol):
    """A `Weight` whose products are more than those of what `dense` gives; arguments as of `product` below."""

    def product(self, equation: str, x: jax.Array, axes: str, out: str) -> jax.Array: ...


def param(key: jax.Array, shape: tuple[int, ...], axes: str, init: Initializer, dtype: jnp.dtype) -> nnx.Param:
    """A fresh parameter at rest on the mesh as `axes` says (see `axes.spec`)."""
    return nnx.Param(init(key, shape, dtype, spec(axes)), axes=axes)


def weight(w: nnx.Param, dtype: jnp.dtype) -> jax.Array:
    """The parameter in `dtype` with its `fsdp` slices gathered."""
    return gather_for_compute(w.get_value(), w.axes, dtype)


def gather_for_compute(value: Any, axes: str, dtype: jnp.dtype) -> jax.Array:
    """An array or `Weight` that rests as `axes` say, in `dtype` with its `fsdp` slices gathered.

    Cast before gathered: the all-gather moves `dtype` bytes, and its transpose is the gradient's reduce-scatter.
    """
    dense = value.dense(dtype) if isinstance(value, Weight) else value.astype(dtype)
    return jax.sharding.reshard(dense, spec(gathered(axes)))


def einsum(equation: str, x: jax.Array, w: nnx.Param, out: str) -> jax.Array:
    """`jnp.einsum(equation, x, w)` in x's dtype, the result lying on the mesh as the axis names `out` say."""
    return product(equation, x, w.get_value(), w.axes, out)


def product(equation: str, x: jax.Array, value: Any, axes: str, out: str) -> jax.Array:
    """`einsum` with what a parameter holds: an array, a `Weight` or a `Product` that rests as `axes` say."""
    if isinstance(value, Product):
        return value.product(equation, x, axes, out)
    return jnp.einsum(equation, x, gather_for_compute(value, axes, x.dtype), out_sharding=spec(out))


def bias_add(x: jax.Array, bias: nnx.Param) -> jax.Array:
    """x (B, T, ...) plus a bias over its trailing axes."""
    value = weight(bias, x.dtype)
    return x + value[(None,) * (x.ndim - value.ndim)]


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; the identity when `key` is None or the rate is 0."""
    if key is None or rate == 0.0:
        return x
    noise = jax.random.uniform(key, x.shape, jnp.float32, out_sharding=jax.typeof(x).sharding)
    return jnp.where(noise >= rate, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros_like(x))


class LayerNorm(nnx.Module):
    """y = (x - mean) / sqrt(var + eps) * scale + bias over the last axis, in float32 (Ba et al. 2016)."""

    def __init__(self, width: int, eps: float, dtype: jnp.dtype):
        self.eps = eps
        self.scale_D = nnx.Param(jnp.ones((width,), dtype, out_sharding=spec("_")), axes="_")
        self.bias_D = nnx.Param(jnp.zeros((width,), dtype, out_sharding=spec("_")), axes="_")

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return normalise(self.eps, x_BTD, weight(self.scale_D, jnp.float32), weight(self.bias_D, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalise(eps: float, x_BTD: jax.Array, scale_D: jax.Array, bias_D: jax.Array) -> jax.Array:
    """`LayerNorm` as a function. Its gradient keeps x and two numbers a token, where autodiff keeps four times x."""
    return _normalise(eps, x_BTD, scale_D, bias_D)[0]


def _normalise(eps, x_BTD, scale_D, bias_D):
    x = x_BTD.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + jnp.float32(eps))
    y = (x - mean) * rstd * scale_D[None, None] + bias_D[None, None]
    return y.astype(x_BTD.dtype), (x_BTD, mean, rstd, scale_D)


def _normalise_gradient(eps, kept, dy_BTD):
    del eps
    x_BTD, mean, rstd, scale_D = kept
    dy = dy_BTD.astype(jnp.float32)
    unit = (x_BTD.astype(jnp.float32) - mean) * rstd
    d = dy * scale_D[None, None]
    dx = (d - d.mean(-1, keepdims=True) - unit * (d * unit).mean(-1, keepdims=True)) * rstd
    return dx.astype(x_BTD.dtype), (dy * unit).sum((0, 1)), dy.sum((0, 1))


normalise.defvjp(_normalise, _normalise_gradient)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """GELU by its tanh approximation, 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (Hendrycks and Gimpel 2016).

    Its gradient keeps x alone.
    """
    return jax.nn.gelu(x, approximate=True)


def _gelu_gradient(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    z, c = x.astype(jnp.float32), jnp.float32((2 / jnp.pi) ** 0.5)
    square = jnp.square(z)
    tanh = jnp.tanh(c * z * (1 + 0.044715 * square))
    slope = 0.5 * (1 + tanh) + 0.5 * z * (1 - jnp.square(tanh)) * c * (1 + 3 * 0.044715 * square)
    return ((dy.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_gradient)


Activation: TypeAlias = Literal["gelu_tanh", "gelu", "relu", "silu"]


def activate(kind: Activation, x: jax.Array) -> jax.Array:
    """The nonlinearity by its name; `gelu_tanh` is `gelu` above, and `gelu` the exact one."""
    match kind:
        case "gelu_tanh":
            return gelu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "relu":
            return jax.nn.relu(x)
        case "silu":
            return jax.nn.silu(x)


class MLP(nnx.Module):
    """f(x up + up_bias) down + down_bias, f being GELU by its tanh approximation (`gelu_new` in Hugging Face) or
    another `activation`."""

    def __init__(
        self, width: int, hidden: int, up: Initializer, down: Initializer, dtype: jnp.dtype, rngs: nnx.Rngs,
        activation: Activation = "gelu_tanh",
    ):  # fmt: skip
        self.activation: Activation = activation
        self.up_DF = param(rngs.params(), (width, hidden), "fsdp mlp", up, dtype)
        self.up_bias_F = param(rngs.params(), (hidden,), "mlp", zeros, dtype)
        self.down_FD = param(rngs.params(), (hidden, width), "mlp fsdp", down, dtype)
        self.down_bias_D = param(rngs.params(), (width,), "_", zeros, dtype)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        u_BTF = bias_add(einsum("BTD,DF->BTF", x_BTD, self.up_DF, "batch seq mlp"), self.up_bias_F)
        u_BTF = checkpoint_name(u_BTF, "mlp_up")
        y_BTD = einsum("BTF,FD->BTD", activate(self.activation, u_BTF), self.down_FD, "batch seq embed")
        return bias_add(y_BTD, self.down_bias_D)


def rotary_table(positions_BT: jax.Array, dims: int, base: float = 10000.0) -> tuple[jax.Array, jax.Array]:
    """(sin, cos), each (B, T, 1, dims / 2) float32: angle = position * base^(-2i / dims) (Su et al. 2021, eq. 15)."""
    frequency = base ** (-jnp.arange(0, dims, 2, dtype=jnp.float32) / dims)
    angle = positions_BT.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    return jnp.sin(angle), jnp.cos(angle)


def rotate(x_BTNH: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """GPT-J's rotary embedding: interleaved pairs of the first R dimensions turn, the rest pass through."""
    sin, cos = table
    dims = 2 * sin.shape[-1]
    # With the sharding said: that of a reshape is ambiguous where an axis is of one element (batch 1, one pair).
    pairs = x_BTNH[..., :dims].astype(jnp.float32)
    pairs = pairs.reshape(*x_BTNH.shape[:-1], dims // 2, 2, out_sharding=spec("batch seq heads _ _"))
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    turned = turned.reshape(*x_BTNH.shape[:-1], dims, out_sharding=spec("batch seq heads _")).astype(x_BTNH.dtype)
    return turned if dims == x_BTNH.shape[-1] else jnp.concatenate([turned, x_BTNH[..., dims:]], axis=-1)


def attend(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    mask_BTS: jax.Array,
    rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v where the mask is True, softmax in float32, with dropout of the probabilities."""
    scale = jnp.asarray(q_BTNH.shape[-1] ** -0.5, q_BTNH.dtype)
    logits_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH * scale, k_BSNH, preferred_element_type=jnp.float32)
    logits_BNTS = jnp.where(mask_BTS[:, None], logits_BNTS, jnp.finfo(jnp.float32).min)
    weights_BNTS = dropout(jax.nn.softmax(logits_BNTS, axis=-1), rate, key).astype(q_BTNH.dtype)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every block of one forward pass shares.

    positions_BT: position of each token (first axis 1 when all rows agree). slots: with a cache, the tokens' place in
    it. rotary: `rotary_table`, for families that turn q and k. key: for dropout, or None.
    segments_BT: the document of each token, where attention must stay within documents.
    layer: the block's number, from 0 on, for families whose scores shrink with it.
    """

    positions_BT: jax.Array
    slots: Slots | None = None
    rotary: tuple[jax.Array, jax.Array] | None = None
    key: jax.Array | None = None
    segments_BT: jax.Array | None = None
    layer: jax.Array | None = None

    def split(self, index: int) -> jax.Array | None:
        """The dropout key of use number `index`: 0 to 2 within a block; of a whole model 3 the embedding, 4 the blocks.

        Index i of `jax.random.split` is the same key as that of use i, so the blocks' keys are split off one of theirs.
        """
        return None if self.key is None else jax.random.fold_in(self.key, index)


def check_documents(kernel: Kernel) -> None:
    """Raises UserError for a kernel that cannot stop at the ends of documents."""
    if kernel == "cudnn":
        raise UserError(
            "execution.attention='cudnn' would look across the documents of a row, which data.mask_documents "
            "forbids: use 'auto', 'splash' (TPU v4 and later) or 'xla'"
        )


class Attention(nnx.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2.2)."""

    def __init__(
        self, width: int, heads: int, qkv: Initializer, out: Initializer, dropout: float, bias: bool,
        dtype: jnp.dtype, rngs: nnx.Rngs, kernel: Kernel,
    ):  # fmt: skip
        head = width // heads
        self.dropout = dropout
        self.kernel: Kernel = kernel
        self.q_DNH = param(rngs.params(), (width, heads, head), "fsdp heads _", qkv, dtype)
        self.k_DNH = param(rngs.params(), (width, heads, head), "fsdp heads _", qkv, dtype)
        self.v_DNH = param(rngs.params(), (width, heads, head), "fsdp heads _", qkv, dtype)
        self.o_NHD = param(rngs.params(), (heads, head, width), "heads _ fsdp", out, dtype)
        self.bias = bias
        if bias:
            self.q_bias_NH = param(rngs.params(), (heads, head), "heads _", zeros, dtype)
            self.k_bias_NH = param(rngs.params(), (heads, head), "heads _", zeros, dtype)
            self.v_bias_NH = param(rngs.params(), (heads, head), "heads _", zeros, dtype)
            self.o_bias_D = param(rngs.params(), (width,), "_", zeros, dtype)

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        q, k, v = self._project(x_BTD, turned=context.rotary is not None)
        if context.rotary is not None:
            q, k = rotate(q, context.rotary), rotate(k, context.rotary)
        if context.layer is not None:
            q = (q.astype(jnp.float32) / (context.layer + 1).astype(jnp.float32)).astype(q.dtype)
        q, k, v = checkpoint_name(q, "q"), checkpoint_name(k, "k"), checkpoint_name(v, "v")
        a_BTNH, cache = self._attend(q, k, v, context, cache)
        # jnp.einsum contracts axes in the alphabetical order of their letters. H before N would copy the weight and the
        # activations into that order; a before b is the order they lie in.
        y_BTD = einsum("BTab,abD->BTD", checkpoint_name(a_BTNH, "attention"), self.o_NHD, "batch seq embed")
        return (bias_add(y_BTD, self.o_bias_D) if self.bias else y_BTD), cache

    def _project(self, x_BTD: jax.Array, turned: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q, k and v; `turned`: whether a rotary embedding turns the first two afterwards."""

        def one(w: nnx.Param) -> jax.Array:
            return einsum("BTD,DNH->BTNH", x_BTD, w, "batch seq heads _")

        q, k, v = one(self.q_DNH), one(self.k_DNH), one(self.v_DNH)
        if not self.bias:
            return q, k, v
        k_bias_NH = weight(self.k_bias_NH, x_BTD.dtype)
        if not turned:
            # It adds one number to all scores of a query, which the softmax takes out: its gradient is 0, and what a
            # program would compute is rounding noise, which Adafactor and Lion would make updates of full size.
            k_bias_NH = jax.lax.stop_gradient(k_bias_NH)
        return bias_add(q, self.q_bias_NH), k + k_bias_NH[None, None], bias_add(v, self.v_bias_NH)

    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, context: Context, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        key = context.split(0)
        dropping = key is not None and self.dropout > 0
        segments_BT = context.segments_BT
        if cache is None:
            if segments_BT is not None:
                check_documents(self.kernel)
            # The fused kernels drop no probabilities: that needs the scores written out.
            shape = q.shape[-1], q.shape[1]
            kernel = "xla" if dropping else pick_kernel(self.kernel, q.dtype, *shape, segments_BT is not None)
            if kernel != "xla":
                return attend_fused(kernel, q, k, v, segments_BT), None
            slots_S = jnp.arange(k.shape[1])
            mask_BTS = slots_S[None, None, :] <= slots_S[None, :, None]
            if segments_BT is not None:
                mask_BTS = mask_BTS & (segments_BT[:, :, None] == segments_BT[:, None, :])
            return attend(q, k, v, mask_BTS, self.dropout, key), None
        assert context.slots is not None
        return attend_cached(q, k, v, cache, context.slots)
