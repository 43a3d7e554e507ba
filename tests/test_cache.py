"""Attention with a cache against PyTorch's over all keys and values at once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from meshgpt.distributed.mesh import spec
from meshgpt.models.kv_cache import LayerCache, Slots, attend_cached

HEADS, SIZE, SLOTS = 4, 8, 12


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def put(values: np.ndarray, axes: str) -> jax.Array:
    return jax.device_put(values, spec(axes))


@pytest.mark.parametrize(
    ("mesh", "rows", "passes"),
    [
        ((1, 1, 1), 1, (3, 1, 1)),
        ((1, 1, 4), 1, (3, 1, 1)),
        ((1, 1, 1), 4, (5, 2, 1)),
        ((2, 1, 4), 4, (5, 2, 1)),
        ((1, 2, 2), 2, (1, 1, 1)),
    ],
)
def test_passes_through_the_cache_are_attention_over_all_of_it(mesh: tuple, rows: int, passes: tuple) -> None:
    length = sum(passes)
    q, k, v = (drawn(seed, rows, length, HEADS, SIZE) for seed in range(3))
    seen = np.random.default_rng(3).random((rows, length, SLOTS)) < 0.6
    seen &= np.arange(SLOTS) <= np.arange(length)[:, None]
    seen[..., 0] = True
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(a).transpose(1, 2) for a in (q, k, v)), attn_mask=torch.from_numpy(seen[:, None, :, :length])
    ).transpose(1, 2)
    with jax.set_mesh(tiny.mesh(*mesh)):
        cache, first = LayerCache.empty(rows, HEADS, SLOTS - 2, SIZE, jnp.dtype("float32")).lengthened(SLOTS), 0
        for count in passes:
            now = slice(first, first + count)
            new = (put(a[:, now], "batch seq heads _") for a in (q, k, v))
            slots = Slots(jnp.int32(first), put(seen[:, now], "batch _ _"))
            y, cache = jax.jit(attend_cached)(*new, cache, slots)
            np.testing.assert_allclose(y, wanted[:, now], atol=1e-5)
            first += count


def test_rows_take_the_caches_of_their_prompts() -> None:
    prompts, rows = 2, np.array([0, 0, 1, 1, 0, 1, 1, 1])
    with jax.set_mesh(tiny.mesh(2, 1, 4)):
        k, v = (put(drawn(seed, prompts, SLOTS, HEADS, SIZE), "batch seq heads _") for seed in range(2))
        slots = Slots(jnp.int32(0), put(np.ones((prompts, SLOTS, SLOTS), bool), "batch _ _"))
        _, cache = jax.jit(attend_cached)(k, k, v, LayerCache.empty(prompts, HEADS, SLOTS, SIZE, k.dtype), slots)
        of_rows = jax.jit(lambda cache, row_R: cache.of_rows(row_R, HEADS))(cache, put(rows, "_"))
        q = drawn(5, len(rows), 1, HEADS, SIZE)
        last = Slots(jnp.int32(SLOTS - 1), put(np.ones((len(rows), 1, SLOTS), bool), "batch _ _"))
        again = (put(np.asarray(a)[rows][:, -1:], "batch seq heads _") for a in (k, v))
        y, _ = jax.jit(attend_cached)(put(q, "batch seq heads _"), *again, of_rows, last)
    q, k, v = (torch.from_numpy(np.array(a)).transpose(1, 2) for a in (q, np.asarray(k)[rows], np.asarray(v)[rows]))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    np.testing.assert_allclose(y, wanted, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_loop_of_tokens_never_copies_the_cache(rows: int) -> None:
    with jax.set_mesh(tiny.mesh(1, 1, 1)):

        @jax.jit
        def loop(x: jax.Array, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
            def body(step: jax.Array, carry: tuple) -> tuple[jax.Array, LayerCache]:
                seen = jnp.broadcast_to(jnp.arange(SLOTS) <= step, (rows, 1, SLOTS))
                return attend_cached(carry[0], carry[0], carry[0], carry[1], Slots(step, seen))

            return jax.lax.fori_loop(0, SLOTS, body, (x, cache))

        cache = LayerCache.empty(rows, HEADS, SLOTS, SIZE, jnp.dtype("float32"))
        text = loop.lower(put(drawn(0, rows, 1, HEADS, SIZE), "batch seq heads _"), cache).compile().as_text() or ""
    body = max(re.findall(r"\n%[^\n]*(?:body|region)[^\n]*\{\n.*?\n\}", text, re.DOTALL), key=len)
    assert "dynamic-update-slice" in body
    assert not re.findall(rf"f32\[{rows * HEADS},{SLOTS},{SIZE}\]\S* copy\(", body)
