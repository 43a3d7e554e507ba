"""GPT-J written as Phi: transformers' Phi and its GPT-J compute the same, and the way back is exact."""

import dataclasses
import json

import numpy as np
import pytest
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
from meshgpt.convert import phi
from meshgpt.convert.tensors import Tensors, open_tensors
from meshgpt.data.tokenizer import train_bpe
from meshgpt.errors import UserError
from meshgpt.models.gptj import GPTJConfig
from meshgpt.models.model import Model
from meshgpt.training.pretrained import Imported, import_model


@dataclasses.dataclass
class Held:
    """A stored tensor in memory."""

    tensor: torch.Tensor
    code = "F32"

    @property
    def shape(self):
        return tuple(self.tensor.shape)

    def map(self):
        return self.tensor.numpy()


SIZES = {"vocab_size": 70, "n_positions": 24, "n_layers": 2, "vocab_multiple": 8}
SHAPES = {
    "rotary 8 of 16": GPTJConfig(**SIZES, n_heads=2, d_model=32, rotary_dim=8),
    "rotary 4 of 16": GPTJConfig(**SIZES, n_heads=4, d_model=64, rotary_dim=4, layer_norm_eps=1e-6),
    "rotary 16 of 16": GPTJConfig(**SIZES, n_heads=2, d_model=32, rotary_dim=16),
    "6 heads of 22, d_ff 40": GPTJConfig(**SIZES, n_heads=6, d_model=132, rotary_dim=14, d_ff=40),
}


def as_phi(model, config, folder):
    """transformers' Phi with the numbers of its GPT-J `model`, which goes by way of `folder`."""
    model.save_pretrained(folder)
    tensors = open_tensors(folder)
    state = {stored.name: torch.tensor(x) for stored, x in phi.contents(convert.contents_of(tensors, config), config)}
    ids = {"bos_token_id": 1, "eos_token_id": 1}
    made = transformers.PhiForCausalLM(transformers.PhiConfig(**phi.config_json(config, ids, "float32")))
    made.load_state_dict(state, strict=True)
    for name, entry in phi.as_gptj(
        Tensors(origin="", entries={k: Held(v) for k, v in state.items()}), config
    ).entries.items():
        np.testing.assert_array_equal(entry.map(), tensors.entries[name].map(), name)
    return made.eval()


def logits(model, tokens_BT):
    """In float64; sdpa is the attention that stays in it."""
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        return model.double()(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_phi_of_transformers_is_its_gptj(config, tmp_path):
    model = peer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that attention looks at single tokens, and the order of rows matters
    tokens_BT = np.random.default_rng(3).integers(0, config.vocab_size, (3, config.n_positions))
    found, wanted = logits(as_phi(model, config, tmp_path), tokens_BT), logits(model, tokens_BT)
    np.testing.assert_allclose(found, wanted, atol=1e-12, rtol=0)
    model.transformer.h[0].attn.q_proj.weight.data = model.transformer.h[0].attn.q_proj.weight.data.roll(1, 0)
    assert np.abs(logits(model, tokens_BT) - wanted).max() > 0.1


def test_export_is_read_by_transformers_and_by_us(tmp_path):
    config = GPTJ_TINY
    params, probe = live(config, ONE)
    verdict = convert.export(params, config, Words(), tmp_path / "phi", probe=probe, family="phi")
    assert phi.NOTE in str(verdict)
    assert "under the name of Phi" in (tmp_path / "phi" / "README.md").read_text()
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "phi").eval()
    assert type(other).__name__ == "PhiForCausalLM"
    assert verdict.parameters == sum(p.numel() for p in other.parameters()) - 4 * config.n_layers * config.d_model
    np.testing.assert_allclose(
        torch_logits(other, probe.tokens_BT), our_logits(params, probe, config), atol=1e-5, rtol=0
    )
    again = convert.open_source(str(tmp_path / "phi"))
    assert dataclasses.replace(again.config, vocab_multiple=8) == dataclasses.replace(config, d_ff=config.mlp_width)


def test_every_share_of_a_head_is_a_whole_number_again():
    for head in range(2, 129, 2):
        for rotary in range(2, head + 1, 2):
            config = GPTJConfig(n_heads=6, d_model=6 * head, rotary_dim=rotary)
            share = phi.rotary_share(config)
            assert int(head * share) == rotary
            assert int(share * config.d_model) // 6 == rotary  # as llama.cpp's converter takes it
            assert share == pytest.approx(rotary / head, abs=1e-15)


@pytest.fixture
def folder(tmp_path):
    """A Phi that is a GPT-J, saved by transformers, to be tampered with."""
    as_phi(peer(GPTJ_TINY), GPTJ_TINY, tmp_path / "gptj").save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "dense"])
def test_phi_proper_is_refused_by_its_biases(name, folder):
    bias = f"model.layers.2.self_attn.{name}.bias"

    def change(tensors):
        tensors[bias][-1] = -0.25
        return tensors

    rewrite(folder, change)
    with pytest.raises(UserError, match=rf"{bias} reaches 0.25.*only GPT-J written as Phi"):
        convert.open_source(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_layernorm": True}, "qk_layernorm is True; supported: False"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1; supported: None, 2"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "rope_theta is 500.0"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling is {"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; supported: False, True"),
        ({"quantization_config": {"load_in_4bit": True}}, "a quantized Phi is not read"),
        ({"rope_parameters": {"partial_rotary_factor": 0.4}}, "rotary_dim=3: give an even number"),
        ({"num_attention_heads": "2"}, "num_attention_heads is '2'; a whole number"),
        ({"rope_parameters": {"partial_rotary_factor": "half"}}, "partial_rotary_factor is 'half'; a number"),
        ({"rope_parameters": "half"}, "rope_parameters is 'half'; a table"),
    ],
)
def test_another_phi_is_refused_by_its_config(change, message, folder):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        convert.read_config(folder)


def test_what_is_missing_or_too_much_is_listed_by_the_names_of_phi(folder):
    def change(tensors):
        del tensors["model.layers.0.self_attn.q_proj.bias"]
        return tensors | {"model.layers.0.self_attn.q_layernorm.weight": torch.ones(8)}

    rewrite(folder, change)
    with pytest.raises(UserError) as caught:
        convert.open_source(str(folder))
    assert "missing: model.layers.0.self_attn.q_proj.bias (16,)" in str(caught.value)
    assert "unexpected: model.layers.0.self_attn.q_layernorm.weight (8,)" in str(caught.value)


def test_gate_sees_a_row_in_the_wrong_place(tmp_path):
    params, probe = live(GPTJ_TINY, ONE)
    out = tmp_path / "out"
    convert.export(params, GPTJ_TINY, Words(), out, probe=probe, family="phi")

    def change(tensors):
        return {k: v.flip(0) if k.endswith("1.self_attn.q_proj.weight") else v for k, v in tensors.items()}

    rewrite(out, change)
    with pytest.raises(UserError, match=r"transformer\.h\.1\.attn\.q_proj\.weight is the first tensor that differs"):
        convert.read_back(out, params, GPTJ_TINY, probe)


def test_gpt2_is_not_phi(tmp_path):
    params, probe = live(GPT2_TINY, ONE)
    with pytest.raises(UserError, match="--as phi is for GPT-J"):
        convert.export(params, GPT2_TINY, Words(), tmp_path / "out", probe=probe, family="phi")
    assert not list(tmp_path.iterdir())


def test_command_and_its_way_back(tmp_path, capsys, on_mesh):
    """A GPT-J folder out as Phi, read by transformers, and that in again as a checkpoint of ours."""
    model = peer(dataclasses.replace(GPTJ_TINY, vocab_size=300))
    begin, out = tmp_path / "begin", tmp_path / "phi"
    model.save_pretrained(begin)
    train_bpe(["a text of words " * 50], 270).save(begin)
    assert cli.main(["export", "--as", "phi", str(begin), "--out", str(out)]) == 0
    assert "under the name of Phi" in capsys.readouterr().out
    transformers.AutoModelForCausalLM.from_pretrained(out).save_pretrained(tmp_path / "theirs")
    assert "rope_parameters" in json.loads((tmp_path / "theirs" / "config.json").read_text())  # not where we write it
    with on_mesh():
        import_model(str(tmp_path / "theirs"), tmp_path / "ours", convert.Surgery(), "float32", print)
        imported = Imported.open(tmp_path / "ours")
        abstract = Model(config=imported.config).abstract_params()
        found, wanted = imported.load(abstract, print), convert.load(begin, imported.config, abstract)
    assert_equal_trees(found, wanted)
    assert imported.config.rotary_dim == GPTJ_TINY.rotary_dim
    assert cli.main(["export", "--as", "phi", "--adapter", str(begin), "--out", str(tmp_path / "x")]) == 2
    assert "give one of them" in capsys.readouterr().err
