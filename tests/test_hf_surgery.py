"""Another vocabulary and another context on import, against PyTorch and NumPy."""

import dataclasses

import numpy as np
import pytest
import torch
from hf_peers import GPT2_TINY, GPTJ_TINY, MESH, Words, assert_equal_trees, live, our_logits, peer, torch_logits
from hypothesis import given
from hypothesis import strategies as st

from meshgpt import convert
from meshgpt.convert.surgery import interpolated, tiled, with_mean_rows
from meshgpt.errors import UserError
from meshgpt.models.gpt2 import GPT2Config

BOTH = pytest.mark.parametrize("config", [GPT2_TINY, GPTJ_TINY], ids=["gpt2", "gptj"])
UNTIED = dataclasses.replace(GPT2_TINY, tied_head=False)


def opened(config, folder, **surgery):
    """(transformers' model, the source, its parameters on the mesh, their probe)."""
    other = peer(config)
    other.save_pretrained(folder)
    source = convert.open_source(str(folder), convert.Surgery(**surgery))
    params, probe = live(source.config, MESH)
    return other, source, source.load(params), probe


@pytest.mark.parametrize("config", [GPT2_TINY, UNTIED, GPTJ_TINY], ids=["gpt2", "untied", "gptj"])
def test_grown_vocabulary_keeps_the_old_logits_and_starts_at_the_mean(config, tmp_path):
    other, source, params, probe = opened(config, tmp_path, vocab_size=150)
    assert source.config.vocab_size == 150
    assert source.notes == ("vocabulary grown from 97 to 150 ids: the 53 new rows are the mean of the old",)
    tokens_BT = probe.tokens_BT % 97
    ours = our_logits(params, dataclasses.replace(probe, tokens_BT=tokens_BT), source.config)
    theirs = torch_logits(other, tokens_BT)
    np.testing.assert_allclose(ours[..., :97], theirs, atol=1e-4, rtol=0)
    # The head is linear: the mean of its rows gives the mean of the logits.
    np.testing.assert_allclose(ours[..., 97:], np.repeat(theirs.mean(-1, keepdims=True), 53, -1), atol=1e-4, rtol=0)
    wte = other.transformer.wte.weight.detach().numpy()
    new = np.asarray(params["wte_VD"])[97:150]
    np.testing.assert_allclose(new, np.tile(wte.mean(0, keepdims=True), (53, 1)), atol=1e-6, rtol=0)
    assert (np.asarray(params["wte_VD"])[150:] == 0).all()


@BOTH
def test_cut_vocabulary_keeps_the_logits_that_are_left(config, tmp_path):
    other, source, params, probe = opened(config, tmp_path, vocab_size=60)
    assert source.notes == ("vocabulary cut from 97 to 60 ids: the last 37 rows are gone",)
    theirs = torch_logits(other, probe.tokens_BT % 60)[..., :60]
    ours = our_logits(params, dataclasses.replace(probe, tokens_BT=probe.tokens_BT % 60), source.config)
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def test_tiled_positions_compute_the_same_in_the_first_tile(tmp_path):
    other, source, params, probe = opened(GPT2_TINY, tmp_path, n_positions=40, extend="tile")
    assert source.notes == (
        "context extended from 16 to 40 tokens by tiling of the position table; train before you use it",
    )
    tokens_BT = np.random.default_rng(0).integers(0, 97, (8, 16), dtype=np.int32)
    ours = our_logits(params, dataclasses.replace(probe, tokens_BT=tokens_BT), source.config)
    np.testing.assert_allclose(ours, torch_logits(other, tokens_BT), atol=1e-4, rtol=0)
    wpe = other.transformer.wpe.weight.detach().numpy()
    np.testing.assert_array_equal(np.asarray(params["wpe_SD"]), np.concatenate([wpe, wpe, wpe[:8]]))


def test_interpolated_positions_are_those_of_torch_and_run(tmp_path):
    other, source, params, probe = opened(GPT2_TINY, tmp_path, n_positions=40)
    assert "from 16 to 40 tokens by linear interpolation" in source.notes[0]
    wpe = other.transformer.wpe.weight.detach()
    wanted = torch.nn.functional.interpolate(wpe.T[None], size=40, mode="linear", align_corners=True)[0].T
    np.testing.assert_allclose(np.asarray(params["wpe_SD"]), wanted.numpy(), atol=1e-6, rtol=0)
    long = np.random.default_rng(0).integers(0, 97, (8, 40), dtype=np.int32)
    assert np.isfinite(our_logits(params, dataclasses.replace(probe, tokens_BT=long), source.config)).all()


@BOTH
def test_shorter_context_changes_no_logits(config, tmp_path):
    other, source, params, probe = opened(config, tmp_path, n_positions=12)
    assert source.config.n_positions == 12
    assert len(source.notes) == 1
    ours = our_logits(params, probe, source.config)
    np.testing.assert_allclose(ours, torch_logits(other, probe.tokens_BT), atol=1e-4, rtol=0)


def test_longer_context_of_gptj_changes_no_parameter(tmp_path):
    _, source, params, _ = opened(GPTJ_TINY, tmp_path, n_positions=64)
    assert source.notes == ("context changed from 16 to 64 tokens; rotary positions need no table",)
    assert_equal_trees(params, convert.load(tmp_path, GPTJ_TINY, params))


def test_both_at_once_survive_an_export(tmp_path):
    _, source, params, probe = opened(UNTIED, tmp_path / "in", vocab_size=128, n_positions=24)
    assert len(source.notes) == 2
    convert.export(params, source.config, Words(), tmp_path / "out", probe=probe)
    again = convert.open_source(str(tmp_path / "out"))
    assert again.config == source.config
    assert again.notes == ()
    assert_equal_trees(again.load(params), params)


def test_nothing_asked_for_is_nothing_changed(tmp_path):
    _, source, params, _ = opened(GPT2_TINY, tmp_path, vocab_size=97, n_positions=16)
    assert source.notes == ()
    assert_equal_trees(params, convert.load(tmp_path, source.config, params))


@pytest.mark.parametrize("name", ["vocab_size", "n_positions"])
def test_negative_sizes_are_refused(name):
    with pytest.raises(UserError, match=f"surgery.{name}=-1"):
        convert.Surgery(**{name: -1})


@given(old=st.integers(1, 9), new=st.integers(1, 30), width=st.integers(1, 3), code=st.sampled_from(["f2", "f4"]))
def test_tables_of_any_size(old, new, width, code):
    table = np.random.default_rng(0).normal(size=(old, width)).astype(code)
    kept = min(old, new)
    for change in (with_mean_rows, interpolated, tiled):
        found = change(table, new)
        assert (found.shape, found.dtype) == ((new, width), table.dtype)
        if new <= old or change is not interpolated:
            np.testing.assert_array_equal(found[:kept], table[:kept])
    if new > max(old, 1):
        wanted = [np.interp(np.linspace(0, old - 1, new), np.arange(old), column) for column in table.T.astype(float)]
        np.testing.assert_allclose(interpolated(table, new), np.stack(wanted, 1), atol=1e-3 if code == "f2" else 1e-6)


def test_default_config_is_gpt2(tmp_path):
    """Extending the published sizes as gpt2-medium-4096 does keeps everything else."""
    _, source, _, _ = opened(GPT2_TINY, tmp_path, n_positions=64, extend="tile")
    assert isinstance(source.config, GPT2Config)
    assert dataclasses.replace(source.config, n_positions=16) == convert.read_config(tmp_path)
