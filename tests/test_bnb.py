"""Codecs in NumPy against bitsandbytes' own kernels: equal to the bit."""

import bitsandbytes.functional as theirs
import numpy as np
import pytest
import torch

from meshgpt.models import bitsandbytes

KINDS: list[bitsandbytes.FourBit] = ["nf4", "fp4"]


def heavy_tailed(scale: float = 1.0) -> np.ndarray:
    """A matrix with outliers, a row of zeros, and exact zeros."""
    x = np.random.default_rng(0).standard_t(3, size=(96, 192)).astype(np.float32) * np.float32(scale)
    x[3] = 0
    x[5, ::2] = 0
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_quant_map_is_theirs(kind: bitsandbytes.FourBit) -> None:
    np.testing.assert_array_equal(bitsandbytes.values(kind), theirs.get_4bit_type(kind, device="cpu").numpy())


def test_nested_quant_map_is_theirs_to_the_bit() -> None:
    np.testing.assert_array_equal(bitsandbytes.nested_values(), theirs.create_dynamic_map().numpy())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-20, 1e30])
def test_packed_bytes_and_absmax_are_theirs(kind: bitsandbytes.FourBit, scale: float) -> None:
    x = heavy_tailed(scale)
    packed, absmax = bitsandbytes.pack4(x, kind)
    peer, state = theirs.quantize_4bit(torch.from_numpy(x.copy()), blocksize=64, quant_type=kind)
    np.testing.assert_array_equal(packed, peer.numpy().ravel())
    np.testing.assert_array_equal(absmax, state.absmax.numpy())
    back = theirs.dequantize_4bit(peer, state).numpy().ravel()
    np.testing.assert_array_equal(bitsandbytes.unpack4(packed, absmax, kind, bitsandbytes.BLOCK), back)


def test_every_bound_is_rounded_as_theirs() -> None:
    """Numbers at and beside the middle between two values, where a wrong tie would show."""
    for kind in KINDS:
        table = np.sort(bitsandbytes.values(kind))
        middle = (table[1:] + table[:-1]) / np.float32(2)
        near = np.concatenate([middle, np.nextafter(middle, np.float32(2)), np.nextafter(middle, np.float32(-2)), [1]])
        x = np.resize(near, 64).astype(np.float32)[None]
        peer, _ = theirs.quantize_4bit(torch.from_numpy(x.copy()), blocksize=64, quant_type=kind)
        np.testing.assert_array_equal(bitsandbytes.pack4(x, kind)[0], peer.numpy().ravel())


def test_matrices_beyond_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    x = heavy_tailed()
    whole, rows = bitsandbytes.pack4(x, "nf4"), bitsandbytes.rows8(x)
    monkeypatch.setattr(bitsandbytes, "_CHUNK", 256)
    for ours, expected in zip((*bitsandbytes.pack4(x, "nf4"), *bitsandbytes.rows8(x)), (*whole, *rows), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_double_quantization_is_theirs(kind: bitsandbytes.FourBit) -> None:
    x = np.concatenate([heavy_tailed(), heavy_tailed(0.1)])  # 576 blocks: the last of 256 is short
    peer, state = theirs.quantize_4bit(torch.from_numpy(x), blocksize=64, quant_type=kind, compress_statistics=True)
    absmax = bitsandbytes.pack4(x, kind)[1]
    codes, scales = bitsandbytes.nearest_nested(absmax - np.float32(state.offset.item()))
    np.testing.assert_array_equal(codes, state.absmax.numpy())
    np.testing.assert_array_equal(scales, state.state2.absmax.numpy())
    nested = bitsandbytes.nest(absmax)
    assert nested.offset == pytest.approx(state.offset.item(), rel=1e-6)  # a mean, summed in another order
    back = bitsandbytes.unpack4(
        peer.numpy().ravel(), bitsandbytes.unnest(nested, bitsandbytes.nested_values(), 256), kind, 64
    )
    np.testing.assert_allclose(back, theirs.dequantize_4bit(peer, state).numpy().ravel(), rtol=1e-5, atol=1e-6)


def test_double_quantization_of_equal_scales() -> None:
    nested = bitsandbytes.nest(np.full(300, 0.25, np.float32))
    np.testing.assert_allclose(bitsandbytes.unnest(nested, bitsandbytes.nested_values(), 256), 0.25, rtol=1e-6)


def test_rows_of_8_bits_are_theirs() -> None:
    x = heavy_tailed()
    x[7, :2] = np.float32(x[7].max() * 2), np.float32(-x[7].max())  # a code halfway between two
    codes, largest = bitsandbytes.rows8(x)
    peer, scale, _ = theirs.int8_vectorwise_quant(torch.from_numpy(x.copy()).half())
    zeros = np.abs(x).max(axis=1) == 0  # theirs divides by zero there
    np.testing.assert_array_equal(codes[~zeros], peer.numpy()[~zeros])
    np.testing.assert_array_equal(largest, scale.numpy())
    assert not codes[zeros].any()
    back = theirs.int8_vectorwise_dequant(peer, scale).numpy()
    np.testing.assert_allclose(bitsandbytes.unrows8(codes, largest)[~zeros], back[~zeros], rtol=1e-6)
