"""What other tools need of an exported folder: its tokenizer's ids, and the settings that they read."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import transformers
from hf_peers import GPT2_TINY, GPTJ_TINY, Words, live, our_logits, torch_logits

from meshgpt import convert
from meshgpt.data.special_tokens import TokenizerFiles
from meshgpt.data.tokenizer import SentencePiece, train_bpe, train_sentencepiece
from meshgpt.errors import UserError
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.gptj import GPTJConfig

# What each reads of config.json, by its own source: transformers and lm-eval (which loads through it); vllm's `gpt2.py`
# and `gpt_j.py`; llama.cpp's `convert_hf_to_gguf.py`, which knows GPT-2 only.
SHARED = {"architectures", "model_type", "torch_dtype", "vocab_size", "bos_token_id", "eos_token_id"} | {
    "n_positions",
    "n_embd",
    "n_head",
    "n_layer",
    "n_inner",
    "activation_function",
    "layer_norm_epsilon",
    "tie_word_embeddings",
}
VLLM_GPT2 = {"add_cross_attention", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"}
VLLM_GPTJ = {"rotary", "rotary_dim"}
LLAMA_CPP = {"n_layer", "n_ctx", "n_embd", "n_head", "layer_norm_epsilon"}


@pytest.fixture(scope="module")
def text():
    folder = Path(sysconfig.get_path("stdlib"))
    return "\n".join((folder / f"{name}.py").read_text() for name in ("argparse", "textwrap", "locale"))


def exported(tokenizer, text, out, vocab=600):
    config = GPTJConfig(
        vocab_size=vocab, n_positions=64, n_layers=1, n_heads=2, d_model=16, rotary_dim=4, vocab_multiple=8
    )
    params, probe = live(config)
    ids = np.asarray(tokenizer.encode(text)[: 8 * 64], np.int32).reshape(8, 64)
    return convert.export(params, config, tokenizer, out, probe=convert.Probe(tokens_BT=ids, logits=probe.logits))


@pytest.mark.parametrize("train", [train_bpe, train_sentencepiece])
def test_tokenizer_travels_with_equal_ids_on_real_text(train, text, tmp_path):
    tokenizer = train([text], 600)
    verdict = exported(tokenizer, text, tmp_path / "out")
    assert verdict.notes == ()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert len(text) > 100_000
    assert theirs.eos_token_id == tokenizer.eot_id
    assert theirs.decode(tokenizer.encode("def f():\n\treturn 'ü'")) == "def f():\n\treturn 'ü'"


def test_sentencepiece_without_an_exact_equivalent_is_owned_up_to(text, tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_prefix=str(tmp_path / "sp"),
        vocab_size=600,
        model_type="unigram",
        minloglevel=2,
    )
    tokenizer = SentencePiece((tmp_path / "sp.model").read_bytes(), TokenizerFiles(), "test")
    verdict = exported(tokenizer, text, tmp_path / "out")
    assert "exported as tokenizer.model alone" in str(verdict)
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    again = sentencepiece.SentencePieceProcessor(str(tmp_path / "out" / "tokenizer.model"))
    assert again.encode(text) == tokenizer.encode(text)


def test_tokenizer_file_with_other_ids_is_not_exported(tmp_path):
    class Other(Words):
        def save(self, folder):
            file = folder / "tokenizer.json"
            super().save(folder)
            file.write_text(file.read_text().replace('"w7"', '"w8?"'))

    params, probe = live(GPT2_TINY)
    with pytest.raises(UserError, match=r"tokenizer\.json gives other ids"):
        convert.export(params, GPT2_TINY, Other(), tmp_path / "out", probe=probe)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "needed"),
    [(GPT2_TINY, SHARED | VLLM_GPT2 | LLAMA_CPP), (GPTJ_TINY, SHARED | VLLM_GPTJ)],
    ids=["gpt2", "gptj"],
)
def test_config_has_what_other_tools_read(config, needed, tmp_path):
    params, probe = live(config)
    convert.export(params, config, Words(), tmp_path / "out", probe=probe, dtype="bfloat16")
    entries = json.loads((tmp_path / "out" / "config.json").read_text())
    assert needed <= entries.keys()
    assert entries["n_inner"] == config.mlp_width
    assert entries["torch_dtype"] == "bfloat16"
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert theirs.max_position_embeddings == config.n_positions
    assert theirs.architectures == ["GPT2LMHeadModel" if isinstance(config, GPT2Config) else "GPTJForCausalLM"]


def test_gpt2_medium_4096_s_kind_of_shape(tmp_path):
    """More layers than any published GPT-2 and a longer context, both ways."""
    config = GPT2Config(vocab_size=50, n_positions=4096, n_layers=26, n_heads=2, d_model=16, vocab_multiple=8)
    params, probe = live(config)
    convert.export(params, config, Words(), tmp_path / "out", probe=probe)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    np.testing.assert_allclose(
        torch_logits(other, probe.tokens_BT), our_logits(params, probe, config), atol=2e-4, rtol=0
    )
    source = convert.open_source(str(tmp_path / "out"))
    assert (source.config.n_layers, source.config.n_positions) == (26, 4096)
    assert source.tokenizer == tmp_path / "out"
