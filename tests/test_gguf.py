"""GGUF files against the `gguf` package: its reader, its quantizer, and the names that llama.cpp looks for."""

import json
import os
import shutil
import sys
from pathlib import Path

import gguf
import hf_peers
import numpy as np
import pytest

from meshgpt import cli
from meshgpt.convert.gguf import open_gguf
from meshgpt.data.tokenizer import train_bpe, train_sentencepiece
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.gptj import GPTJConfig

VOCAB = 320
# More rows than ids: what is over is padding of the vocabulary.
CONFIG = GPT2Config(vocab_size=VOCAB + 40, n_positions=32, n_layers=2, n_heads=2, d_model=64, d_ff=96)
GPTJ = GPTJConfig(vocab_size=VOCAB + 40, n_positions=32, n_layers=2, n_heads=2, d_model=64, d_ff=96, rotary_dim=8)
# The largest error of a block, in its largest number: half a step, or a step where the largest takes the odd end.
ERRORS = {
    "f32": 0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127,
    "q5_1": 2 / 31, "q5_0": 1 / 16, "q4_1": 2 / 15, "q4_0": 1 / 8,
}  # fmt: skip
TEXT = Path(os.__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def gptj(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "gptj"
    hf_peers.peer(GPTJ).save_pretrained(folder)
    train_bpe([TEXT], VOCAB).save(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "gpt2"
    hf_peers.peer(CONFIG).save_pretrained(folder)
    train_bpe([TEXT], VOCAB).save(folder)
    return folder


def written(source: Path, out: Path, kind: str, *flags: str) -> gguf.GGUFReader:
    assert cli.main(["quantize", str(source), "--format", f"gguf-{kind}", "--out", str(out), *flags]) == 0
    return gguf.GGUFReader(out / f"model-{kind}.gguf")


@pytest.mark.parametrize("kind", ERRORS)
def test_tensors_are_those_of_the_package(kind: str, source: Path, tmp_path: Path) -> None:
    tensors = {tensor.name: tensor for tensor in written(source, tmp_path / "out", kind).tensors}
    weights = {name: value.detach().numpy() for name, value in hf_peers.peer(CONFIG).state_dict().items()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, CONFIG.n_layers)
    expected = {
        names.get_name(n, try_suffixes=(".weight", ".bias")): w for n, w in weights.items() if n != "lm_head.weight"
    }
    assert tensors.keys() == expected.keys()
    for name, weight in expected.items():
        rows = weight.T if name.startswith("blk") and weight.ndim == 2 else weight
        found = tensors[name]
        assert found.shape.tolist() == list(rows.shape[::-1])  # ggml counts axes from the last
        block = kind if name.startswith("blk") or kind[0] != "q" else "q8_0"
        plain = rows.ndim == 1 or name == "position_embd.weight"
        assert found.tensor_type.name == ("F32" if plain else block.upper()), name
        bytes_ = gguf.quantize(np.ascontiguousarray(rows), found.tensor_type)
        np.testing.assert_array_equal(found.data, bytes_, name)
        back = gguf.dequantize(found.data, found.tensor_type).reshape(rows.shape)
        step = 0 if plain else np.abs(rows).max() * ERRORS[block]
        assert np.abs(back - rows).max() <= 1.01 * step + 1e-9, name


def test_gptj_is_phi2(gptj: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The names and shapes that the package has for Phi-2, and rows whose halves turn as GPT-J's pairs do."""
    read = written(gptj, tmp_path / "out", "f32")
    for text in (capsys.readouterr().out, (tmp_path / "out" / "README.md").read_text()):
        assert "under the name of Phi" in text
    fields = {name: field.contents() for name, field in read.fields.items()}
    assert fields["general.architecture"] == "phi2"
    assert fields["phi2.rope.dimension_count"] == 8
    assert fields["phi2.attention.head_count"] == fields["phi2.attention.head_count_kv"] == 2
    assert fields["phi2.feed_forward_length"] == 96
    assert fields["phi2.rope.freq_base"] == 10000.0
    tensors = {tensor.name: tensor.data for tensor in read.tensors}
    known = gguf.MODEL_TENSORS[gguf.MODEL_ARCH.PHI2]
    unused = {f"blk.{layer}.{name}" for layer in (0, 1) for name in ("attn_q", "attn_k", "attn_v", "ffn_norm")}
    names = {gguf.TENSOR_NAMES[tensor].format(bid=layer) for tensor in known for layer in range(2)}
    assert {name.rpartition(".")[0] for name in tensors} == names - unused
    theirs = {name: value.detach().numpy() for name, value in hf_peers.peer(GPTJ).state_dict().items()}
    qkv = tensors["blk.1.attn_qkv.weight"].reshape(3, 2, 32, 64)
    q, k, v = (theirs[f"transformer.h.1.attn.{part}_proj.weight"].reshape(2, 32, 64) for part in "qkv")
    np.testing.assert_array_equal(qkv[0, :, :4], q[:, 0:8:2])
    np.testing.assert_array_equal(qkv[1, :, 4:8], k[:, 1:8:2])
    np.testing.assert_array_equal(qkv[:2, :, 8:], np.stack([q, k])[:, :, 8:])
    np.testing.assert_array_equal(qkv[2], v)
    assert not tensors["blk.1.attn_qkv.bias"].any()
    assert not tensors["blk.0.attn_output.bias"].any()
    np.testing.assert_array_equal(tensors["output.bias"], theirs["lm_head.bias"])


@pytest.mark.parametrize("kind", ["f32", "q4_0"])
def test_gptj_is_read_back_as_it_was(kind: str, gptj: Path, tmp_path: Path) -> None:
    read = written(gptj, tmp_path / "out", kind)
    back = open_gguf(tmp_path / "out" / f"model-{kind}.gguf", GPTJ)
    theirs = {name: value.detach().numpy() for name, value in hf_peers.peer(GPTJ).state_dict().items()}
    assert back.entries.keys() == theirs.keys()
    assert len(read.tensors) == 2 * 10 + 5
    for name, entry in back.entries.items():
        error = np.abs(entry.map() - theirs[name]).max()
        assert error <= (0 if theirs[name].ndim == 1 else np.abs(theirs[name]).max() * ERRORS[kind] * 1.01), name


def test_modelfile_for_ollama(gptj: Path, tmp_path: Path) -> None:
    written(gptj, tmp_path / "out", "q8_0")
    assert (tmp_path / "out" / "Modelfile").read_text() == "FROM ./model-q8_0.gguf\nPARAMETER num_ctx 32\n"


@pytest.mark.parametrize(("kind", "value"), [("f16", 7e4), ("q4_1", 7e4), ("q8_0", 9e6), ("q4_0", 6e5)])
def test_what_16_bits_do_not_hold_is_named(
    kind: str, value: float, gptj: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = shutil.copytree(gptj, tmp_path / "spoilt")

    def spoil(tensors: dict) -> dict:
        tensors["transformer.h.1.mlp.fc_in.weight"][3, 5] = value
        return tensors

    hf_peers.rewrite(spoilt, spoil)
    assert cli.main(["quantize", str(spoilt), "--format", f"gguf-{kind}", "--out", str(tmp_path / "out")]) == 2
    assert f"model.layers.1.mlp.fc1.weight reaches {value:.4g}, and {kind}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    written(spoilt, tmp_path / "out", "bf16")


def test_rows_of_any_length_in_16_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = tmp_path / "odd"
    hf_peers.peer(GPT2Config(vocab_size=VOCAB, n_positions=16, n_layers=1, n_heads=2, d_model=40)).save_pretrained(odd)
    train_bpe([TEXT], VOCAB).save(odd)
    assert cli.main(["quantize", str(odd), "--format", "gguf-q4_1", "--out", str(tmp_path / "out")]) == 2
    assert "gguf-f16 and int8 are for such a model" in capsys.readouterr().err
    written(odd, tmp_path / "out", "f16")


def test_settings_and_vocabulary(source: Path, tmp_path: Path) -> None:
    fields = {name: field.contents() for name, field in written(source, tmp_path / "out", "q8_0").fields.items()}
    assert fields["general.architecture"] == "gpt2"
    assert fields["gpt2.block_count"] == 2
    assert fields["gpt2.context_length"] == 32
    assert fields["gpt2.embedding_length"] == 64
    assert fields["gpt2.feed_forward_length"] == 96
    assert fields["gpt2.attention.head_count"] == 2
    assert fields["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    saved = json.loads((source / "tokenizer.json").read_text())
    words = fields["tokenizer.ggml.tokens"]
    assert {word: i for i, word in enumerate(words[:VOCAB])} == saved["model"]["vocab"]
    assert len(words) == CONFIG.vocab_size
    assert set(fields["tokenizer.ggml.token_type"][VOCAB:]) == {gguf.TokenType.UNUSED}
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in saved["model"]["merges"]]
    end = saved["model"]["vocab"]["<|endoftext|>"]
    assert fields["tokenizer.ggml.eos_token_id"] == fields["tokenizer.ggml.bos_token_id"] == end
    assert fields["tokenizer.ggml.token_type"][end] == gguf.TokenType.CONTROL
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")


def test_quality_of_what_was_read_back(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "held.txt"
    text.write_text(TEXT[:1500], encoding="utf-8")
    shift = {}
    for kind in ("q8_0", "q4_0"):
        written(source, tmp_path / kind, kind, "--eval-text", str(text))
        card = (tmp_path / kind / "README.md").read_text()
        row = next(line for line in card.splitlines() if "bits per byte" in line)
        before, after = (float(cell) for cell in row.split("|")[2:4])
        shift[kind] = abs(after / before - 1)
    assert shift["q8_0"] < 0.01
    assert shift["q8_0"] < shift["q4_0"] < 0.2


def test_sentencepiece_is_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sp"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((source / name).read_bytes())
    train_sentencepiece([TEXT], VOCAB + 30).save(folder)
    assert cli.main(["quantize", str(folder), "--format", "gguf-q8_0", "--out", str(tmp_path / "out")]) == 2
    assert "byte-level BPE" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_the_package(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert cli.main(["quantize", str(source), "--format", "gguf-q8_0", "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'meshgpt[gguf]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
