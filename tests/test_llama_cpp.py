"""The real llama.cpp on our GGUF files, beside transformers on the same weights. For it: pip install xllamacpp."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import hf_peers
import numpy as np
import pytest
import torch

from meshgpt import cli
from meshgpt.convert.gguf import open_gguf
from meshgpt.data.tokenizer import train_bpe
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.gptj import GPTJConfig

pytestmark = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="pip install xllamacpp")

TEXT = Path(os.__file__).read_text(encoding="utf-8")
SIZES = {"vocab_size": 360, "n_positions": 48, "n_layers": 2}  # 40 ids more than the tokenizer has
GPT2 = GPT2Config(**SIZES, n_heads=6, d_model=96, d_ff=160)
GPTJ = GPTJConfig(**SIZES, n_heads=6, d_model=96, d_ff=160, rotary_dim=4, layer_norm_eps=1e-6)
CONFIGS = {
    "gpt2": GPT2,
    "gpt2 untied": dataclasses.replace(GPT2, tied_head=False),
    "gptj": GPTJ,
    "gptj tied": dataclasses.replace(GPTJ, tied_head=True),
    "gptj, all of a head turns": dataclasses.replace(GPTJ, n_heads=3, rotary_dim=32, d_ff=0),
}
PROMPTS = [np.random.default_rng(size).integers(0, 320, size).tolist() for size in range(1, 9)]
NEW = 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([TEXT], 320)


@pytest.fixture(scope="module")
def banned(tokenizer) -> list[int]:
    """Ids that are a part of a character, and the end of text."""
    return [i for i in range(320) if i == tokenizer.eot_id or not tokenizer.decode([i]).isascii()]


def model_folder(config, tokenizer, folder: Path):
    """A model of transformers, in `folder` with a tokenizer."""
    model = hf_peers.peer(config)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return model


class TableGELU(torch.nn.Module):
    """GELU as llama.cpp has it on CPUs: from a table over float16, of float16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0 * x, torch.where(x >= 10, x, y))


def greedy(model, prompt: list[int], banned: list[int], new: int = NEW) -> list[tuple[int, float]]:
    """transformers' choices and their log-probabilities."""
    ids, found = list(prompt), []
    with torch.no_grad():
        for _ in range(new):
            scores = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(scores.index_fill(0, torch.tensor(banned), -torch.inf).argmax()))
            found.append((ids[-1], float(scores[ids[-1]])))
    return found


def llama(kinds: list[str], source: Path, banned: list[int], new: int = NEW) -> np.ndarray:
    """(kinds, prompts, new, 2): llama.cpp's choices and their log-probabilities, of `source` quantized to each kind."""
    files = []
    for kind in kinds:
        out = source.with_name(kind)
        assert cli.main(["quantize", str(source), "--format", f"gguf-{kind}", "--out", str(out)]) == 0
        files.append(str(out / f"model-{kind}.gguf"))
    request = source.with_name("request.json")
    request.write_text(json.dumps({"files": files, "prompts": PROMPTS, "banned": banned, "new": new}))
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("llama_cpp.py")), str(request)],
        capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    return np.array(json.loads(child.stdout))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_greedy_tokens_and_log_probabilities_are_those_of_transformers(config, tokenizer, banned, tmp_path) -> None:
    model = model_folder(config, tokenizer, tmp_path / "theirs")
    wanted = np.array([greedy(model, prompt, banned) for prompt in PROMPTS])
    assert len(np.unique(wanted[..., 0])) > 10
    for block in model.transformer.h:
        block.mlp.act = TableGELU()
    by_table = np.array([greedy(model, prompt, banned) for prompt in PROMPTS])
    for found, tolerance in zip(llama(["f32", "f16"], tmp_path / "theirs", banned), (5e-4, 5e-3), strict=True):
        np.testing.assert_array_equal(found[..., 0], wanted[..., 0])
        np.testing.assert_allclose(found[..., 1], by_table[..., 1], atol=tolerance, rtol=0)


def test_every_other_form_is_the_model_that_the_package_reads(tokenizer, banned, tmp_path) -> None:
    """The first choice after each prompt, and its log-probability, beside transformers on the dequantized weights."""
    model, kinds = model_folder(GPTJ, tokenizer, tmp_path / "theirs"), ["bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
    for kind, found in zip(kinds, llama(kinds, tmp_path / "theirs", banned, new=1), strict=True):
        read = open_gguf(tmp_path / kind / f"model-{kind}.gguf", GPTJ)
        model.load_state_dict({name: torch.tensor(entry.map()) for name, entry in read.entries.items()})
        for prompt, (token, log_probability) in zip(PROMPTS, found[:, 0], strict=True):
            ((_, best),) = greedy(model, prompt, banned, new=1)
            with torch.no_grad():
                scores = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
            # It rounds activations to 8 bits, which decides between two that are near.
            assert best - scores[int(token)] < 0.1, kind
            assert log_probability == pytest.approx(float(scores[int(token)]), abs=0.1), kind
