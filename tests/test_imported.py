"""Other people's weights in: `meshgpt import`, `--init`, and what a run remembers of them."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from hf_peers import GPT2_TINY, GPTJ_TINY, peer

from meshgpt import cli, convert, train
from meshgpt.checkpoint.manager import Checkpointing
from meshgpt.config import Data, Run, Samples
from meshgpt.data.prepare import Prepare
from meshgpt.data.tokenizer import train_bpe
from meshgpt.distributed.mesh import spec
from meshgpt.errors import UserError
from meshgpt.models.precision import Precision
from meshgpt.optim.config import AdamW, Constant
from meshgpt.training.load import open_trained
from meshgpt.training.pretrained import adopt, import_model
from meshgpt.training.run_folder import RunFolder

TEXT = Path(dataclasses.__file__).read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small random GPT-2 in the Hugging Face format, with a tokenizer trained on our text."""
    out = tmp_path_factory.mktemp("theirs") / "gpt2"
    config = dataclasses.replace(GPT2_TINY, vocab_size=300)
    peer(config).save_pretrained(out)
    train_bpe([TEXT], 300).save(out)
    return out


def _run(tmp_path: Path, source: Path, **changes: object) -> Run:
    (tmp_path / "text.txt").write_text(TEXT)
    prepare = Prepare(sources=(str(tmp_path / "text.txt"),), out="", tokenizer=str(source), val_fraction=0.0, workers=1)
    run = Run(
        model=GPT2_TINY,
        data=Data(prepare=prepare),
        steps=2,
        global_batch=8,
        seq_len=8,
        optim=AdamW(peak_lr=1e-9, warmup_steps=0, schedule=Constant(), weight_decay=0.0),
        checkpointing=Checkpointing(every=1),
        samples=Samples(prompts=()),
        init=str(source),
        run_dir=str(tmp_path / "run"),
    )
    return dataclasses.replace(run, **changes)


def _logits(source: Path) -> np.ndarray:
    trained = open_trained(source, Precision(compute="float32"), print)
    tokens = jax.device_put(np.arange(8, dtype=np.int32)[None].repeat(8, 0), spec("batch seq"))
    decoder = trained.model.bind(trained.params)
    return np.asarray(decoder.logits(decoder.hidden(tokens)))[0, :, : trained.model.config.vocab_size]


def _theirs(source: Path) -> np.ndarray:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        return model(torch.arange(8)[None]).logits[0].numpy()


@pytest.mark.slow
def test_a_run_starts_from_their_weights_and_remembers_the_sizes(tmp_path, folder):
    run = _run(tmp_path, folder)
    train.train(run)
    record = json.loads((tmp_path / "run" / "run.json").read_text())["run"]
    assert record["init"] == str(folder)
    assert record["model"]["vocab_size"] == 300  # the source's, not the recipe's
    assert json.loads((tmp_path / "run" / "init.json").read_text()) == {"source": str(folder), "notes": []}
    # The learning rate is next to nothing: what the run exports is what it started from.
    np.testing.assert_allclose(_theirs(tmp_path / "run" / "export"), _theirs(folder), atol=1e-4)
    # It goes on without the source.
    moved = folder.rename(folder.with_name("elsewhere"))
    try:
        longer = dataclasses.replace(run, steps=3)
        assert adopt(longer, RunFolder(tmp_path / "run")).model.vocab_size == 300
    finally:
        moved.rename(folder)


def test_import_is_what_transformers_computes(tmp_path, folder, on_mesh, capsys):
    assert cli.main(["import", str(folder), "--out", str(tmp_path / "ours")]) == 0
    assert "is ready" in capsys.readouterr().out
    with on_mesh(2, 2, 2):
        np.testing.assert_allclose(_logits(tmp_path / "ours"), _theirs(folder), atol=1e-4)
    assert cli.main(["import", str(folder), "--out", str(tmp_path / "ours")]) == 2
    assert "exists" in capsys.readouterr().err


def test_import_keeps_the_dtype_that_was_asked_for_and_serves_as_a_start(tmp_path, folder, on_mesh):
    with on_mesh():
        import_model(str(folder), tmp_path / "ours", convert.Surgery(), "bfloat16", print)
        np.testing.assert_allclose(_logits(tmp_path / "ours"), _theirs(folder), atol=0.05)
        adopted = adopt(_run(tmp_path, folder, init=str(tmp_path / "ours")), RunFolder(tmp_path / "none"))
    assert adopted.model.vocab_size == 300


def test_bad_sources_are_refused(tmp_path, folder, on_mesh):
    with pytest.raises(UserError, match="recipe of that family"):
        adopt(dataclasses.replace(_run(tmp_path, folder), model=GPTJ_TINY), RunFolder(tmp_path / "none"))
    with pytest.raises(UserError, match="neither a folder nor"):
        adopt(dataclasses.replace(_run(tmp_path, folder), init="/nowhere"), RunFolder(tmp_path / "none"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "imported.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        adopt(dataclasses.replace(_run(tmp_path, folder), init=str(tmp_path / "broken")), RunFolder(tmp_path / "none"))
    with on_mesh(), pytest.raises(UserError, match="no steps to choose from"):
        open_trained(folder, Precision(), print, step=3)


def test_another_tokenizer_is_refused(tmp_path, folder):
    other = tmp_path / "other"
    train_bpe([TEXT[:2000]], 290).save(other)
    run = _run(tmp_path, folder)
    assert run.data.prepare is not None
    prepared = dataclasses.replace(run.data.prepare, tokenizer=str(other))
    with pytest.raises(UserError, match="gives other ids"):
        train.train(dataclasses.replace(run, data=Data(prepare=prepared)))
