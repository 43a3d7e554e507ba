"""A folder of weights alone: in, out and quantized, with a note; what needs words is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hf_peers import GPT2_TINY, GPTJ_TINY, peer

from meshgpt import cli, convert
from meshgpt.convert import verify


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "gptj"
    peer(GPTJ_TINY).save_pretrained(folder)
    return folder


def logits(folder: Path) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits.numpy()


def test_export_of_an_imported_folder(weights, tmp_path, capsys, monkeypatch) -> None:
    compared = []
    kept = verify.read_back
    monkeypatch.setattr(convert.hf_write, "read_back", lambda *a, **k: compared.append(a[3].tokens_BT) or kept(*a, **k))
    assert cli.main(["import", str(weights), "--out", str(tmp_path / "ours")]) == 0
    assert cli.main(["export", str(tmp_path / "ours"), "--as", "phi", "--out", str(tmp_path / "out")]) == 0
    assert convert.NO_TOKENIZER in capsys.readouterr().out
    assert len(np.unique(compared[0])) > 10  # random ids
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] is None
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] is None
    assert not list((tmp_path / "out").glob("*token*"))
    np.testing.assert_allclose(logits(tmp_path / "out"), logits(weights), atol=1e-5, rtol=0)


def test_quantize(weights, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", str(weights), "--format", "int8", "--dtype", "float32", "--out", str(out)]
    (tmp_path / "text.txt").write_text("a text")
    assert cli.main([*arguments, "--eval-text", str(tmp_path / "text.txt")]) == 2
    assert "has no tokenizer, which --eval-text and --eval-choices need" in capsys.readouterr().err
    assert cli.main(arguments) == 0
    assert convert.NO_TOKENIZER in capsys.readouterr().out
    assert convert.NO_TOKENIZER in (out / "README.md").read_text()
    before, after = logits(weights), logits(out)
    assert np.sqrt(np.mean((after - before) ** 2)) < 0.05 * before.std()
    arguments[3:4], arguments[-1] = ["gguf-q8_0"], str(tmp_path / "gguf")
    assert cli.main(arguments) == 2
    assert "llama.cpp takes the tokenizer from the file" in capsys.readouterr().err


def test_what_needs_words_says_what_is_missing(weights, tmp_path, capsys) -> None:
    assert cli.main(["generate", str(weights), "--prompt", "a"]) == 2
    assert "holds no tokenizer" in capsys.readouterr().err


def test_a_hugging_face_folder_too(tmp_path, capsys) -> None:
    peer(GPT2_TINY).save_pretrained(tmp_path / "in")
    assert cli.main(["export", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    assert convert.NO_TOKENIZER in capsys.readouterr().out
    np.testing.assert_allclose(logits(tmp_path / "out"), logits(tmp_path / "in"), atol=1e-5, rtol=0)
