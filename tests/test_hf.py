"""Hugging Face in and out, against transformers and safetensors themselves."""

import dataclasses
import json
import math
import os
import shutil
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from hf_peers import (
    GPT2_TINY,
    GPTJ_TINY,
    MESH,
    ONE,
    Words,
    assert_equal_trees,
    live,
    our_logits,
    peer,
    rewrite,
    torch_logits,
)
from hypothesis import given
from hypothesis import strategies as st

from meshgpt import convert, trees
from meshgpt.convert import atomic_folder, safetensor
from meshgpt.convert.hf_names import by_path, stored_tensors
from meshgpt.distributed.mesh import MeshShape
from meshgpt.errors import UserError
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.gptj import GPTJConfig

BOTH = pytest.mark.parametrize("config", [GPT2_TINY, GPTJ_TINY], ids=["gpt2", "gptj"])
GPT2_UNTIED = GPT2Config(
    vocab_size=50, n_positions=20, n_layers=1, n_heads=3, d_model=24, d_ff=40, tied_head=False, vocab_multiple=16
)
GPTJ_ALL_TURNING = GPTJConfig(
    vocab_size=64, n_positions=16, n_layers=2, n_heads=3, d_model=24, rotary_dim=8, vocab_multiple=8
)
VARIANTS = {
    "gpt2": (GPT2_TINY, MESH),
    "gpt2 untied, odd heads": (GPT2_UNTIED, MeshShape(data=2, fsdp=4)),
    "gptj": (GPTJ_TINY, MESH),
    "gptj odd heads, all turning": (GPTJ_ALL_TURNING, ONE),
}


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    peer(GPT2_TINY).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(gpt2_folder, tmp_path):
    """A folder of transformers' own GPT-2 to be tampered with."""
    return shutil.copytree(gpt2_folder, tmp_path / "model")


@pytest.mark.parametrize(("config", "mesh"), VARIANTS.values(), ids=VARIANTS.keys())
def test_import_gives_the_logits_of_transformers(config, mesh, tmp_path):
    other = peer(config)
    other.save_pretrained(tmp_path)
    params, probe = live(config, mesh)
    found = convert.read_config(tmp_path)
    assert dataclasses.replace(found, vocab_multiple=config.vocab_multiple) == dataclasses.replace(
        config, d_ff=config.mlp_width
    )
    loaded = convert.load(tmp_path, found, params)
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == jax.tree.map(lambda leaf: leaf.sharding, params)
    np.testing.assert_allclose(
        our_logits(loaded, probe, config), torch_logits(other, probe.tokens_BT), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(("config", "mesh"), VARIANTS.values(), ids=VARIANTS.keys())
def test_export_gives_our_logits_in_transformers(config, mesh, tmp_path):
    params, probe = live(config, mesh)
    verdict = convert.export(params, config, Words(), tmp_path / "out", probe=probe)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert other.config.model_type in ("gpt2", "gptj")
    assert other.config.eos_token_id == other.generation_config.eos_token_id == 49
    assert verdict.parameters == sum(parameter.numel() for parameter in other.parameters())
    assert verdict.logit_error <= 1e-6
    np.testing.assert_allclose(
        torch_logits(other, probe.tokens_BT), our_logits(params, probe, config), atol=1e-4, rtol=0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_keeps_every_bit(config, dtype, tmp_path):
    peer(config).to(getattr(torch, dtype)).save_pretrained(tmp_path / "in")
    params, probe = live(config, dtype="bfloat16" if dtype == "bfloat16" else "float32")
    read = convert.read_config(tmp_path / "in")
    loaded = convert.load(tmp_path / "in", read, params)
    convert.export(loaded, read, Words(), tmp_path / "out", probe=probe, dtype=dtype)
    before = safetensors.torch.load_file(tmp_path / "in" / "model.safetensors")
    after = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert tensor.contiguous().view(torch.uint8).equal(after[name].view(torch.uint8)), name
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == getattr(torch, dtype)


@BOTH
def test_rounded_export_passes_the_gate_and_says_by_how_much(config, tmp_path):
    params, probe = live(config)
    verdict = convert.export(params, config, Words(), tmp_path / "out", probe=probe, dtype="bfloat16")
    assert 0 < verdict.logit_error < 0.1


@BOTH
def test_equal_parameters_give_equal_bytes_on_any_mesh(config, tmp_path):
    for name, mesh in (("a", MESH), ("b", ONE)):
        params, probe = live(config, mesh)
        convert.export(params, config, Words(), tmp_path / name, probe=probe)
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files == {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"}
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@BOTH
def test_large_model_is_sharded_with_an_index(config, tmp_path):
    params, probe = live(config)
    seen = []
    out = tmp_path / "out"
    convert.export(
        params, config, Words(), out, probe=probe, shard_bytes=9_000, on_progress=lambda *state: seen.append(state)
    )
    shards = sorted(out.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    assert all(file.stat().st_size < 9_000 + 3_000 for file in shards)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == seen[-1][0] == seen[-1][1]
    other = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    np.testing.assert_allclose(torch_logits(other, probe.tokens_BT), our_logits(params, probe, config), atol=1e-4)
    loaded = convert.load(out, config, params)
    np.testing.assert_array_equal(our_logits(loaded, probe, config), our_logits(params, probe, config))


def test_release_frees_the_live_parameters(tmp_path):
    params, probe = live(GPT2_TINY)
    convert.export(params, GPT2_TINY, Words(), tmp_path / "out", probe=probe, release=True)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_prefix_masks_and_a_copied_head_change_nothing(folder, gpt2_folder):
    params, _ = live(GPT2_TINY)

    def change(tensors):
        bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        return bare | {
            "h.0.attn.bias": torch.ones(1, 1, 16, 16),
            "h.1.attn.masked_bias": torch.tensor(-1e4),
            "lm_head.weight": tensors["transformer.wte.weight"].clone(),
        }

    rewrite(folder, change)
    assert_equal_trees(convert.load(folder, GPT2_TINY, params), convert.load(gpt2_folder, GPT2_TINY, params))


def test_everything_that_does_not_fit_is_listed(folder):
    params, _ = live(GPT2_TINY)

    def change(tensors):
        del tensors["transformer.h.0.ln_1.bias"]
        tensors["transformer.h.1.mlp.c_fc.weight"] = torch.zeros(3, 5)
        tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"].to(torch.int64)
        return tensors | {"score.weight": torch.zeros(2)}

    rewrite(folder, change)
    with pytest.raises(UserError) as caught:
        convert.load(folder, GPT2_TINY, params)
    message = str(caught.value)
    assert "4 tensors" in message
    assert "missing: transformer.h.0.ln_1.bias (16,)" in message
    assert "shape: transformer.h.1.mlp.c_fc.weight is (3, 5), and the configuration says (16, 64)" in message
    assert "dtype: transformer.wpe.weight is I64" in message
    assert "unexpected: transformer.score.weight (2,)" in message


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_value_that_is_not_finite_is_refused_by_name(folder, value):
    params, _ = live(GPT2_TINY)
    name = "transformer.h.1.attn.c_attn.weight"

    def change(tensors):
        tensors[name][3, 40] = value
        return tensors

    rewrite(folder, change)
    with pytest.raises(UserError, match=name):
        convert.load(folder, GPT2_TINY, params)


def test_head_that_differs_from_the_tied_embedding_is_refused(folder):
    params, _ = live(GPT2_TINY)
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1})
    with pytest.raises(UserError, match="tie_word_embeddings"):
        convert.load(folder, GPT2_TINY, params)


def test_tensor_there_twice_is_refused(folder):
    params, _ = live(GPT2_TINY)
    rewrite(folder, lambda tensors: tensors | {"wpe.weight": tensors["transformer.wpe.weight"] + 1})
    with pytest.raises(UserError, match=r"wpe\.weight is there twice"):
        convert.load(folder, GPT2_TINY, params)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_truncated_file_is_refused(folder, keep):
    params, _ = live(GPT2_TINY)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="cut short"):
        convert.load(folder, GPT2_TINY, params)


@pytest.mark.parametrize(
    "header", [b"[]", b'{"a":', b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b'{"a":1}']
)
def test_broken_header_is_refused(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with pytest.raises(UserError, match="broken header"):
        safetensor.read_header(file)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
def test_index_pointing_elsewhere_is_refused(folder, name):
    params, _ = live(GPT2_TINY)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    with pytest.raises(UserError, match="refused"):
        convert.load(folder, GPT2_TINY, params)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"weight_map": {"wte.weight": "model-7.safetensors"}}', "missing: model-7.safetensors"),
        ("{", "not an index"),
        ("[]", "not an index"),
    ],
)
def test_bad_index_is_refused(folder, text, message):
    params, _ = live(GPT2_TINY)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=message):
        convert.load(folder, GPT2_TINY, params)


def test_folder_without_a_model_is_refused(folder):
    params, _ = live(GPT2_TINY)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no model"):
        convert.load(folder, GPT2_TINY, params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; supported: 'gpt2', 'gptj'"),
        ({"activation_function": "tanh"}, "activation_function is 'tanh'"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"n_layer": "12"}, "n_layer is '12'; a whole number"),
        ({"attn_pdrop": "no"}, "attn_pdrop is 'no'; a number"),
    ],
)
def test_config_of_another_model_is_refused(folder, change, message):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        convert.read_config(folder)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_broken_config_is_refused(tmp_path, text):
    with pytest.raises(UserError, match=r"has no config\.json"):
        convert.read_config(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is not"):
        convert.read_config(tmp_path)


def test_what_a_config_leaves_out_is_the_default_of_transformers(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gptj", "rotary_dim": null}')
    assert convert.read_config(tmp_path) == GPTJConfig(d_ff=16384, rotary_dim=256)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert convert.read_config(tmp_path) == GPT2Config(d_ff=3072, embd_dropout=0.1, attn_dropout=0.1, resid_dropout=0.1)


@BOTH
def test_overflow_and_bad_values_leave_nothing_behind(config, tmp_path):
    params, probe = live(config)
    leaf = params["blocks"]["mlp"]["up_DF"]
    for value, message in ((70000.0, "overflows float16"), (math.nan, "not finite")):
        changed = np.array(leaf)
        changed[1, 2, 3] = value
        params["blocks"]["mlp"]["up_DF"] = jax.device_put(changed, leaf.sharding)
        with pytest.raises(UserError, match=rf"h\.1\.mlp\..*{message}"):
            convert.export(params, config, Words(), tmp_path / "out", probe=probe, dtype="float16")
        assert list(tmp_path.iterdir()) == []


class Failing(Words):
    def save(self, folder):
        (folder / "tokenizer.json").touch()
        raise OSError(28, os.strerror(28))


def test_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    params, probe = live(GPT2_TINY)
    with pytest.raises(UserError, match="disk is full"):
        convert.export(params, GPT2_TINY, Failing(), tmp_path / "out", probe=probe)
    monkeypatch.setattr(atomic_folder.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 0, 10**6))
    with pytest.raises(UserError, match=r"1,000,000 bytes free and the export takes 64,0"):
        convert.export(params, GPT2_TINY, Words(), tmp_path / "out", probe=probe)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_is_kept_unless_it_is_to_be_replaced(tmp_path):
    params, probe = live(GPT2_TINY)
    out = tmp_path / "out"
    out.mkdir()
    convert.export(params, GPT2_TINY, Words(), out, probe=probe)
    with pytest.raises(UserError, match="holds a model already"):
        convert.export(params, GPT2_TINY, Words(), out, probe=probe)
    (out / "left over").touch()
    convert.export(params, GPT2_TINY, Words(), out, probe=probe, replace=True)
    assert not (out / "left over").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").touch()
    with pytest.raises(UserError, match="not an exported model"):
        convert.export(params, GPT2_TINY, Words(), tmp_path / "home", probe=probe, replace=True)
    assert (tmp_path / "home" / "letter.txt").exists()


@BOTH
def test_gate_names_the_first_tensor_that_differs(config, tmp_path):
    params, probe = live(config)
    out = tmp_path / "out"
    convert.export(params, config, Words(), out, probe=probe)
    name = "transformer.h.1.ln_1.weight"
    for later in ("transformer.ln_f.bias", name):

        def change(tensors, later=later):
            tensors[later][-1] = torch.nextafter(tensors[later][-1], torch.tensor(math.inf))
            return tensors

        rewrite(out, change)
        with pytest.raises(UserError, match=rf"{later} is the first tensor that differs"):
            convert.read_back(out, params, config, probe)


def test_gate_compares_configuration_count_and_logits(tmp_path):
    params, probe = live(GPT2_TINY)
    out = tmp_path / "out"
    convert.export(params, GPT2_TINY, Words(), out, probe=probe)
    with pytest.raises(UserError, match="reads back as"):
        convert.read_back(out, params, dataclasses.replace(GPT2_TINY, layer_norm_eps=1e-6), probe)
    calls = iter([1.0, 1.001])
    drifting = dataclasses.replace(probe, logits=lambda p, t: probe.logits(p, t) * next(calls))
    with pytest.raises(UserError, match="logits differ"):
        convert.read_back(out, params, GPT2_TINY, drifting)
    rewrite(out, lambda tensors: {name: tensors[name] for name in tensors if "ln_f" not in name})
    with pytest.raises(UserError, match="parameters, and the live model has"):
        convert.read_back(out, params, GPT2_TINY, probe)


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=4),
    code=st.sampled_from(sorted(safetensor.DTYPES)),
)
def test_file_format_is_the_one_of_the_library(shapes, code, tmp_path_factory):
    file = tmp_path_factory.mktemp("st") / "x.safetensors"
    dtype = safetensor.DTYPES[code]
    rng = np.random.default_rng(0)
    arrays = {f"name {i}": rng.normal(size=shape).astype(dtype) for i, shape in enumerate(shapes)}
    with safetensor.Writer(file, [(name, array.shape) for name, array in arrays.items()], dtype) as writer:
        for name, array in arrays.items():
            writer.add(name, array)
    theirs = safetensors.torch.load_file(file)
    assert theirs.keys() == arrays.keys()
    for name, entry in safetensor.read_header(file).items():
        np.testing.assert_array_equal(entry.map(), arrays[name])
        np.testing.assert_array_equal(theirs[name].float().numpy(), arrays[name].astype(np.float32))
    safetensors.numpy.save_file({name: a for name, a in arrays.items() if dtype != ml_dtypes.bfloat16}, file)
    for name, entry in safetensor.read_header(file).items():
        np.testing.assert_array_equal(entry.map(), arrays[name])


@BOTH
def test_every_parameter_is_in_the_name_table_once(config):
    params, _ = live(config)
    holders = by_path(stored_tensors(config))
    assert set(holders) == {name for name, _ in trees.leaves_with_names(params)}
    for name, leaf in trees.leaves_with_names(params):
        assert len(holders[name]) == (leaf.shape[0] if name.startswith("blocks/") else 1)
