"""Fused causal attention: cuDNN's on NVIDIA GPUs, splash attention on TPU v4 and later; and which one runs where.

What runs is decided by the devices of the mesh that is set, not by those of this process: a program may be compiled for
a pod that is elsewhere.

Legend: B batch, T tokens, N heads, H head size.
"""

import re
from typing import Literal

import jax
import jax.numpy as jnp

from meshgpt.distributed.mesh import spec
from meshgpt.errors import UserError

Kernel = Literal["auto", "xla", "cudnn", "splash"]

_HOPPER = r"\bG?H\d{2,3}\b|\bG?B\d{3}\b"  # H100, H200, GH200, B200: cuDNN takes heads of 256 there
_SPLASH_BLOCK = 512  # 2048 overflows a v5e's vector memory at head size 256


def pick_kernel(
    kernel: Kernel, dtype: jnp.dtype, head_size: int, length: int = 128, documents: bool = False
) -> Literal["xla", "cudnn", "splash"]:
    """What runs: "auto" takes the mesh's own fused kernel where it can run, else "xla".

    cuDNN: an NVIDIA GPU, 16 bits, head size a multiple of 8 up to 128 (256 on Hopper). Splash: TPU v4 or later, head
    size a multiple of 64, `length` tokens a multiple of 128. `documents`: attention must stop at their ends, which
    cuDNN's, as JAX offers it, cannot.

    Raises:
      UserError: when a kernel is asked for by name and cannot run, with the reason.
    """
    if kernel == "xla":
        return "xla"
    platform, kind = _device()
    refusals = {
        "cudnn": _cudnn_refusal(platform, kind, dtype, head_size, documents),
        "splash": _splash_refusal(platform, kind, head_size, length),
    }
    if kernel != "auto":
        if refusals[kernel]:
            raise UserError(f"execution.attention={kernel!r} cannot run here: {refusals[kernel]}; use 'auto' or 'xla'")
        return kernel
    if not refusals["cudnn"]:
        return "cudnn"
    return "xla" if refusals["splash"] else "splash"


def _device() -> tuple[str, str]:
    """Platform and kind of the mesh's devices; where no mesh is set, of this process's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend(), jax.devices()[0].device_kind
    platform = device.platform or ""
    return {"cuda": "gpu"}.get(platform, platform), device.device_kind


def _cudnn_refusal(platform: str, kind: str, dtype: jnp.dtype, head_size: int, documents: bool) -> str | None:
    if documents:
        return "it would look across the documents of a row, which data.mask_documents forbids"
    if platform != "gpu":
        return f"the backend is {platform}, not gpu"
    if dtype.itemsize != 2:
        return f"it computes in 16 bits, and the compute dtype is {dtype}"
    limit = 256 if re.search(_HOPPER, kind) else 128
    if head_size % 8 or head_size > limit:
        return f"the head size {head_size} is not a multiple of 8 up to {limit}"
    return None


def _splash_refusal(platform: str, kind: str, head_size: int, length: int) -> str | None:
    if platform != "tpu":
        return f"the backend is {platform}, not tpu"
    if re.match(r"TPU v[23]\b", kind):
        return f"it does not compile for {kind}"
    if head_size % 64 or length % 128:
        return f"it needs a head size of a multiple of 64 (here {head_size}) and of 128 tokens (here {length})"
    return None


def attend_fused(
    kernel: Literal["cudnn", "splash"], q: jax.Array, k: jax.Array, v: jax.Array, segments_BT: jax.Array | None = None
) -> jax.Array:
    """softmax(q k^T / sqrt(H), causal) v for q, k and v (B, T, N, H), each device with its own rows and heads.

    segments_BT: the document of each token, where attention must stay within documents (splash alone can).
    """
    heads = spec("batch seq heads _")
    if segments_BT is None:
        local = _cudnn if kernel == "cudnn" else splash
        return jax.shard_map(local, in_specs=(heads,) * 3, out_specs=heads, check_vma=False)(q, k, v)
    assert kernel == "splash"
    specs = (heads, heads, heads, spec("batch seq"))
    return jax.shard_map(splash, in_specs=specs, out_specs=heads, check_vma=False)(q, k, v, segments_BT)


def _cudnn(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q_BTNH, k_BTNH, v_BTNH, is_causal=True, implementation="cudnn")


def splash(
    q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, segments_BT: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Splash attention on one device; `interpret` runs it anywhere, slowly."""
    # A second to import, and on TPU only.
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, length, heads, head_size = q_BTNH.shape
    block = next(size for size in (_SPLASH_BLOCK, 256, 128) if length % size == 0)
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    scale = jnp.asarray(head_size**-0.5, q_BTNH.dtype)
    q_BNTH, k_BNTH, v_BNTH = (x.swapaxes(1, 2) for x in (q_BTNH * scale, k_BTNH, v_BTNH))
    segments = None if segments_BT is None else SegmentIds(q=segments_BT, kv=segments_BT)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        kernel = kernels.make_splash_mha(
            mask=mask, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret
        )
        a_BNTH = jnp.asarray(jax.vmap(kernel)(q_BNTH, k_BNTH, v_BNTH, segments))
    return a_BNTH.swapaxes(1, 2).astype(q_BTNH.dtype)
