"""Folders of models that are GPT-2 or GPT-J but for a detail, as other tools leave them, against transformers."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from hf_peers import (
    GPT2_TINY,
    GPTJ_TINY,
    ONE,
    Words,
    assert_equal_trees,
    live,
    our_logits,
    peer,
    rewrite,
    torch_logits,
)

from meshgpt import cli, convert
from meshgpt.config import from_json, to_json
from meshgpt.convert.gguf import open_gguf
from meshgpt.data.tokenizer import train_bpe
from meshgpt.errors import UserError
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.gptj import GPTJConfig

CRFM = dataclasses.replace(GPT2_TINY, inverse_layer_attention=True, activation="relu", n_layers=3)
TIED = dataclasses.replace(GPTJ_TINY, tied_head=True)


def reconfigured(folder, **changes):
    file = folder / "config.json"
    entries = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in entries.items() if value != "gone"}))


@pytest.fixture
def folder(tmp_path):
    peer(GPT2_TINY).save_pretrained(tmp_path / "in")
    return tmp_path / "in"


@pytest.mark.parametrize("config", [CRFM, TIED], ids=["crfm", "tied gptj"])
def test_in_and_out_give_the_logits_of_transformers_and_the_same_bytes(config, tmp_path):
    other = peer(config)
    other.save_pretrained(tmp_path / "in")
    reconfigured(tmp_path / "in", reorder_and_upcast_attn=isinstance(config, GPT2Config))
    params, probe = live(config, ONE)
    read = dataclasses.replace(convert.read_config(tmp_path / "in"), vocab_multiple=8)
    assert read == dataclasses.replace(config, d_ff=config.mlp_width)
    loaded = convert.load(tmp_path / "in", read, params)
    ours = our_logits(loaded, probe, config)
    np.testing.assert_allclose(ours, torch_logits(other, probe.tokens_BT), atol=1e-4, rtol=0)
    for family in ("own",) if isinstance(config, GPT2Config) else ("own", "phi"):
        out = tmp_path / family
        convert.export(loaded, read, Words(), out, probe=probe, family=family)
        again = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
        np.testing.assert_allclose(torch_logits(again, probe.tokens_BT), ours, atol=1e-4, rtol=0)
        assert_equal_trees(convert.load(out, convert.read_config(out), loaded), loaded)
    before, after = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("in", "own"))
    assert before.keys() == after.keys()
    assert all(tensor.equal(after[name]) for name, tensor in before.items())


def test_fields_that_came_later_are_only_in_json_where_they_are_used():
    """run.json and what is compared with it are as they were before these fields."""
    before = {"type", "vocab_size", "n_positions", "n_layers", "n_heads", "d_model", "d_ff", "layer_norm_eps"}
    before |= {"vocab_multiple", "tied_head", "embd_dropout", "attn_dropout", "resid_dropout"}
    assert set(to_json(GPT2Config())) == before
    assert "tied_head" not in to_json(GPTJConfig())
    for config in (CRFM, TIED, GPT2_TINY, GPTJ_TINY):
        assert from_json(GPT2Config | GPTJConfig, to_json(config)) == config


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_accurate", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu", "gelu"),
        ("relu", "relu"),
        ("silu", "silu"),
        ("swish", "silu"),
    ],
)
def test_activations_by_the_names_of_transformers(theirs, ours, folder):
    from meshgpt.models.layers import activate

    reconfigured(folder, activation_function=theirs)
    assert convert.read_config(folder).activation == ours
    x = torch.linspace(-6, 6, 1001)
    wanted = transformers.activations.ACT2FN[theirs](x).numpy()
    np.testing.assert_allclose(activate(ours, x.numpy()), wanted, atol=2e-6, rtol=0)


ALIASES = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
ALIASES |= {"n_positions": "max_position_embeddings"}


@pytest.mark.parametrize("config", [GPT2_TINY, GPTJ_TINY], ids=["gpt2", "gptj"])
def test_sizes_by_their_other_names(config, tmp_path):
    peer(config).save_pretrained(tmp_path)
    wanted, entries = convert.read_config(tmp_path), json.loads((tmp_path / "config.json").read_text())
    renamed = {other: entries[name] for name, other in ALIASES.items()} | dict.fromkeys(ALIASES, "gone")
    reconfigured(tmp_path, **renamed)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (theirs.n_embd, theirs.n_layer) == (config.d_model, config.n_layers)
    assert convert.read_config(tmp_path) == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, "n_embd is 16 and hidden_size, another name of it, 32"),
        ({"n_layer": "gone", "num_hidden_layers": "2"}, "num_hidden_layers is '2'; a whole number"),
        ({"activation_function": "tanh"}, "activation_function is 'tanh'; supported: 'gelu_new'"),
        ({"scale_attn_by_inverse_layer_idx": 1.5}, "scale_attn_by_inverse_layer_idx is 1.5"),
        ({"model_type": "gptj", "rotary_dim": 4, "activation_function": "relu"}, "activation_function is 'relu'"),
    ],
)
def test_bad_settings_are_named(changes, message, folder):
    reconfigured(folder, **changes)
    with pytest.raises(UserError, match=message):
        convert.read_config(folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.transformer."])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_wrappers_names_and_float64(prefix, form, folder):
    """torch.compile's and DataParallel's names, with the numbers in float64."""
    params, _ = live(GPT2_TINY)
    wanted = convert.load(folder, GPT2_TINY, params)

    def change(tensors):
        bare = {name.removeprefix("transformer."): tensor.double() for name, tensor in tensors.items()}
        return {f"{prefix}{name}": tensor for name, tensor in bare.items()}

    if form == "safetensors":
        rewrite(folder, change)
    else:
        torch.save(change(safetensors.torch.load_file(folder / "model.safetensors")), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    source = convert.open_source(str(folder))
    assert source.notes == ("weights in float64 are rounded to float32",)
    assert_equal_trees(convert.load(folder, GPT2_TINY, params), wanted)


def test_float64_beyond_float32_is_named(folder):
    def change(tensors):
        double = {name: tensor.double() for name, tensor in tensors.items()}
        double["transformer.h.1.mlp.c_fc.bias"][3] = 1e300
        return double

    rewrite(folder, change)
    params, _ = live(GPT2_TINY)
    with pytest.raises(UserError, match=r"h\.1\.mlp\.c_fc\.bias holds a value that is not finite in float32"):
        convert.load(folder, GPT2_TINY, params)


def test_heads_of_other_tools_are_left_out_when_asked(folder, tmp_path, capsys):
    heads = {"v_head.summary.weight": torch.ones(1, 16), "score.weight": torch.ones(2, 16)}
    rewrite(folder, lambda tensors: tensors | heads)
    with pytest.raises(UserError) as caught:
        convert.open_source(str(folder))
    assert "2 tensors do not fit" in str(caught.value)
    assert "left out by meshgpt import --ignore-extra" in str(caught.value)
    source = convert.open_source(str(folder), convert.Surgery(ignore_extra=True))
    note = "left out, as --ignore-extra asks: transformer.score.weight, transformer.v_head.summary.weight"
    assert source.notes == (note,)
    assert cli.main(["import", "--ignore-extra", str(folder), "--out", str(tmp_path / "ours")]) == 0
    assert note in capsys.readouterr().out
    assert note in json.loads((tmp_path / "ours" / "imported.json").read_text())["notes"]


def test_what_belongs_in_the_model_is_never_left_out(folder):
    rewrite(folder, lambda tensors: tensors | {"transformer.h.2.ln_1.weight": torch.ones(16)})
    with pytest.raises(UserError, match=r"unexpected: transformer\.h\.2\.ln_1\.weight"):
        convert.open_source(str(folder), convert.Surgery(ignore_extra=True))


def test_gguf_takes_what_llama_cpp_computes(tmp_path, capsys):
    tied = dataclasses.replace(TIED, vocab_size=300, d_model=32, rotary_dim=8, d_ff=64)
    for name, config in (("crfm", dataclasses.replace(CRFM, vocab_size=300)), ("tied", tied)):
        peer(config).save_pretrained(tmp_path / name)
        train_bpe(["a text of words " * 50], 270).save(tmp_path / name)
    arguments = ["--format", "gguf-f32", "--out", str(tmp_path / "out")]
    assert cli.main(["quantize", str(tmp_path / "crfm"), *arguments]) == 2
    assert "activation=relu, inverse_layer_attention=True: nf4, fp4 and int8" in capsys.readouterr().err
    assert cli.main(["quantize", str(tmp_path / "tied"), *arguments]) == 0
    read = open_gguf(tmp_path / "out" / "model-f32.gguf", tied)
    theirs = peer(tied).state_dict()
    for name, entry in read.entries.items():
        np.testing.assert_array_equal(entry.map(), theirs[name].numpy(), name)
    assert "lm_head.weight" in read.entries  # llama.cpp's Phi has a head of its own
