"""A trained model from a run's folder and from its export: the same one, and the one that transformers sees."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
import tiny
import torch
import transformers

from meshgpt.errors import UserError
from meshgpt.inference.generate import Sampling, generate
from meshgpt.models.precision import Precision
from meshgpt.training.load import Trained, open_trained
from meshgpt.trees import leaves_with_names

PROMPTS = ("def ", "import os\n", "class A:\n    def")


@pytest.fixture(params=["gptj", "gpt2"])
def run(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("finished" if request.param == "gptj" else "finished_gpt2")


def opened(source: Path, step: int | None = None) -> Trained:
    return open_trained(source, Precision(), print, step)


def test_transformers_continues_the_export_as_we_continue_the_run(run: Path):
    """Greedy tokens, three prompts at once here and one at a time there."""
    with jax.set_mesh(tiny.mesh(2, 2, 2)):
        trained = opened(run)
        ids = trained.tokenizer.encode_batch(list(PROMPTS))
        eot = trained.tokenizer.eot_id
        sampling = Sampling(max_new_tokens=16, temperature=0.0)
        ours = [
            samples[0]
            for samples in generate(trained.model, trained.params, ids, sampling, stop_ids={eot}, begin_id=eot)
        ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "export")
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "export").eval()
    for prompt, encoded, tokens in zip(PROMPTS, ids, ours, strict=True):
        theirs = tokenizer(prompt, return_tensors="pt")
        assert theirs.input_ids[0].tolist() == encoded
        with torch.no_grad():
            out = model.generate(**theirs, max_new_tokens=16, do_sample=False, pad_token_id=eot)[0].tolist()
        assert [token for token in out[len(encoded) :] if token != eot] == tokens
        assert tokenizer.decode(tokens) == trained.tokenizer.decode(tokens)


def test_the_export_is_the_run(run: Path):
    with jax.set_mesh(tiny.mesh(1, 4, 2)):
        ours, theirs = opened(run), opened(run / "export")
        assert (ours.step, theirs.step) == (20, None)
        assert ours.tokenizer.fingerprint == theirs.tokenizer.fingerprint
        expected = dict(leaves_with_names(theirs.params))
        for name, leaf in leaves_with_names(ours.params):
            # The padding of the vocabulary is no part of the export.
            rows = ours.model.config.vocab_size if name in ("wte_VD", "head_VD", "head_bias_V") else None
            assert leaf.sharding == expected[name].sharding
            np.testing.assert_array_equal(np.asarray(leaf)[:rows], np.asarray(expected[name])[:rows], err_msg=name)


def test_a_step_can_be_asked_for(finished: Path):
    with jax.set_mesh(tiny.mesh()):
        assert opened(finished, 15).step == 15
        with pytest.raises(UserError, match=r"--step 7: .* keeps the checkpoints of steps \[15, 20\]"):
            opened(finished, 7)
        with pytest.raises(UserError, match=r"--step 15: .* is a Hugging Face folder"):
            opened(finished / "export", 15)


def test_a_damaged_checkpoint_is_passed_over_unless_it_is_asked_for(finished: Path, tmp_path: Path):
    run = runs.copied(finished, tmp_path / "run")
    files = [path for path in (run / "checkpoints" / "20").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    said: list[str] = []
    with jax.set_mesh(tiny.mesh()):
        assert open_trained(run, Precision(), said.append).step == 15
        assert "passed over" in said[0]
        with pytest.raises(UserError, match=r"--step 20: .* cannot be used: .*bytes"):
            opened(run, 20)


def test_what_is_no_model_is_refused(tmp_path: Path, finished: Path):
    run = runs.copied(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    with jax.set_mesh(tiny.mesh()):
        with pytest.raises(UserError, match="does not exist"):
            opened(tmp_path / "nowhere")
        with pytest.raises(UserError, match=r"none of run\.json, imported\.json and config\.json"):
            opened(tmp_path)
        with pytest.raises(UserError, match="has no checkpoint yet"):
            opened(run)
