"""GGUF files against the `gguf` package: its reader, its quantizer, and the names that llama.cpp looks for."""

import json
import os
import sys
from pathlib import Path

import gguf
import hf_peers
import numpy as np
import pytest

from meshgpt import cli
from meshgpt.data.tokenizer import train_bpe, train_sentencepiece
from meshgpt.models.gpt2 import GPT2Config

VOCAB = 320
# More rows than ids: what is over is padding of the vocabulary.
CONFIG = GPT2Config(vocab_size=VOCAB + 40, n_positions=32, n_layers=2, n_heads=2, d_model=64, d_ff=96)
TEXT = Path(os.__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "gpt2"
    hf_peers.peer(CONFIG).save_pretrained(folder)
    train_bpe([TEXT], VOCAB).save(folder)
    return folder


def written(source: Path, out: Path, kind: str, *flags: str) -> gguf.GGUFReader:
    assert cli.main(["quantize", str(source), "--format", f"gguf-{kind}", "--out", str(out), *flags]) == 0
    return gguf.GGUFReader(out / f"model-{kind}.gguf")


@pytest.mark.parametrize(("kind", "steps"), [("q8_0", 1 / 127), ("q4_0", 1 / 8)])
def test_tensors_are_those_of_the_package(kind: str, steps: float, source: Path, tmp_path: Path) -> None:
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
        block = kind if name.startswith("blk") else "q8_0"
        plain = rows.ndim == 1 or name == "position_embd.weight"
        assert found.tensor_type.name == ("F32" if plain else block.upper()), name
        bytes_ = gguf.quantize(np.ascontiguousarray(rows), found.tensor_type)
        np.testing.assert_array_equal(found.data, bytes_, name)
        back = gguf.dequantize(found.data, found.tensor_type).reshape(rows.shape)
        step = 0 if plain else np.abs(rows).max() * (1 / 127 if block == "q8_0" else steps)
        assert np.abs(back - rows).max() <= 1.01 * step + 1e-9, name


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
