"""Codecs against bitsandbytes' published maps and code, and against the papers' equations in NumPy."""

import bitsandbytes.functional
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from meshgpt.optim import codecs

CODECS = [codecs.DYNAMIC_8, codecs.DYNAMIC_8_UNSIGNED, codecs.DYNAMIC_4]


@pytest.mark.parametrize("codec", CODECS)
def test_dynamic_maps_are_those_of_bitsandbytes(codec: codecs.Dynamic) -> None:
    theirs = bitsandbytes.functional.create_dynamic_map(codec.signed, codec.bits - 1, codec.bits).numpy()
    theirs = theirs if codec.bits == 8 else np.sort(np.append(theirs[theirs != 0], 0))  # it pads 16 values with zeros
    if not codec.signed:  # ours divide: the value that is 0 in theirs is the lower end of the lowest decade
        assert theirs[0] == 0
        theirs[0] = 10.0 ** (1 - codec.bits)
    np.testing.assert_allclose(codec.values, theirs, rtol=3e-7, atol=0)
    assert len(set(codec.values.tolist())) == 2**codec.bits


@pytest.mark.parametrize("codec", CODECS)
def test_encoding_finds_the_nearest_value(codec: codecs.Dynamic) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.uniform(-1, 1, 4000), rng.uniform(-1, 1, 4000) * 10.0 ** rng.uniform(-8, 0, 4000), [0, 1, -1]]
    )
    x = (x if codec.signed else np.abs(x)).astype(np.float32)
    decoded = np.asarray(codec.decode(jax.jit(codec.encode)(x)), np.float64)
    best = np.abs(x.astype(np.float64)[:, None] - codec.values[None].astype(np.float64)).min(1)
    assert (np.abs(decoded - x) <= best * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize("codec", [codecs.DYNAMIC_8_UNSIGNED, codecs.LINEAR_4])
def test_nothing_that_is_divided_by_is_decoded_to_zero(codec: codecs.Codec) -> None:
    x = np.concatenate([np.zeros(1), 10.0 ** np.linspace(-38, 0, 500)]).astype(np.float32)
    assert (np.asarray(codec.decode(codec.encode(jnp.asarray(x)))) > 0).all()


@pytest.mark.parametrize("codec", [*CODECS, codecs.LINEAR_4])
def test_every_value_is_its_own_nearest(codec: codecs.Codec) -> None:
    codes = jnp.arange(2**codec.bits, dtype=jnp.uint8)
    np.testing.assert_array_equal(codec.encode(codec.decode(codes)), codes)


def test_linear_without_zero_is_the_papers() -> None:
    """T(i) = (i + 1) / 2^b (Li, Chen and Zhu, equation 2 with the zero point removed)."""
    values = (np.arange(16) + 1) / 16
    np.testing.assert_array_equal(codecs.LINEAR_4.decode(jnp.arange(16, dtype=jnp.uint8)), values.astype(np.float32))
    x = np.random.default_rng(1).uniform(0, 1, 2000).astype(np.float32)
    nearest = np.abs(x[:, None] - values[None]).argmin(1)
    np.testing.assert_array_equal(codecs.LINEAR_4.encode(x), nearest)
    assert codecs.LINEAR_4.encode(jnp.zeros(1, jnp.float32))[0] == 0  # and it decodes to 1 / 16, never to 0


def test_blocks_equal_bitsandbytes() -> None:
    x = np.random.default_rng(2).normal(size=(8, 512)).astype(np.float32) ** 3
    codes, scales = codecs.quantize(jnp.asarray(x), codecs.DYNAMIC_8, 256)
    theirs, state = bitsandbytes.functional.quantize_blockwise(torch.from_numpy(x.copy()), blocksize=256)
    np.testing.assert_array_equal(np.asarray(scales).ravel(), state.absmax.numpy())
    peer = bitsandbytes.functional.dequantize_blockwise(torch.from_numpy(np.array(codes)), state).numpy()
    ours = codecs.dequantize(codes, scales, codecs.DYNAMIC_8, 256)
    np.testing.assert_allclose(ours, peer, rtol=1e-6, atol=0)
    # Its CPU kernel looks codes up after rounding its argument: it is near, where ours is nearest.
    looked_up = bitsandbytes.functional.dequantize_blockwise(theirs, state).numpy()
    assert (np.abs(ours - x) <= np.abs(looked_up - x) * (1 + 1e-5) + 3e-6 * np.abs(x)).all()
    assert (np.asarray(codes) == theirs.numpy()).mean() > 0.9


def test_blocks_of_zeros_come_back_as_zeros() -> None:
    x = jnp.zeros((2, 300), jnp.float32).at[0, 299].set(1e-42)
    codes, scales = codecs.quantize(x, codecs.DYNAMIC_8, 256)
    assert scales.shape == (2, 2)
    np.testing.assert_array_equal(codecs.dequantize(codes, scales, codecs.DYNAMIC_8, 256), np.zeros((2, 300)))


@pytest.mark.parametrize(("rows", "columns", "block"), [(1, 37, 1), (3, 40, 16), (2, 5, 8), (4, 300, 256)])
def test_blocks_that_do_not_divide_are_padded(rows: int, columns: int, block: int) -> None:
    x = np.random.default_rng(columns).normal(size=(rows, columns)).astype(np.float32)
    codes, scales = codecs.quantize(jnp.asarray(x), codecs.DYNAMIC_8, block)
    expected = [np.abs(x[:, k : k + block]).max(1) for k in range(0, columns, block)]
    np.testing.assert_array_equal(scales, np.stack(expected, 1))
    back = codecs.dequantize(codes, scales, codecs.DYNAMIC_8, block)
    # Half the map's coarsest step, 0.9 / 64; and it has 1 but no -1.
    bound = np.repeat(np.stack(expected, 1), block, 1)[:, :columns] * 0.9 / 64 / 2 + 1e-6
    assert (np.abs(np.asarray(back) - x) <= bound).all()


@pytest.mark.parametrize(("rows", "columns"), [(2, 1), (6, 7)])
def test_packing_two_a_byte_is_undone(rows: int, columns: int) -> None:
    codes = np.random.default_rng(columns).integers(0, 16, (rows, columns), dtype=np.uint8)
    packed = codecs.pack(jnp.asarray(codes))
    np.testing.assert_array_equal(packed, codes[::2] + 16 * codes[1::2])
    np.testing.assert_array_equal(codecs.unpack(packed), codes)


def test_rank_1_scales_are_the_papers() -> None:
    x = np.random.default_rng(3).uniform(size=(5, 7)).astype(np.float32)
    scale = np.asarray(codecs.rank1(jnp.asarray(x.max(1, keepdims=True)), jnp.asarray(x.max(0, keepdims=True))))
    expected = [[min(x[i].max(), x[:, j].max()) for j in range(7)] for i in range(5)]
    np.testing.assert_array_equal(scale, expected)
    assert (scale >= x).all()
