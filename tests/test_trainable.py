"""Runs that train adapters or last layers: what they keep, go on from, generate with and export; beside PEFT."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
import tiny
import torch
import transformers

from meshgpt import trees
from meshgpt.checkpoint.manager import read_metadata
from meshgpt.config import Data, Run
from meshgpt.data.tokenizer import load_tokenizer
from meshgpt.errors import UserError
from meshgpt.models.layers import Execution
from meshgpt.models.model import ModelConfig
from meshgpt.models.trainable import Full, LastLayers, LoRA, Trainable
from meshgpt.training.pretrained import adopt
from meshgpt.training.program import Program
from meshgpt.training.run_folder import RunFolder

RECIPE = """import dataclasses
from pathlib import Path

from meshgpt.models.trainable import LastLayers, LoRA

exec(Path({base!r}).read_text())
whole = config


def config():
    return dataclasses.replace(
        whole(), trainable={part}, init={init!r}, steps=4, optim=AdamW(peak_lr=1e-2, warmup_steps=1), eval_every=2,
        checkpointing=Checkpointing(every=2), samples=Samples(prompts=("def ",), max_new_tokens=4),
    )
"""


def recipe(workshop: runs.Workshop, folder: Path, family: str, part: str, init: object) -> Path:
    path = folder / "part.py"
    path.write_text(RECIPE.format(base=str(workshop.recipe(folder, family)), part=part, init=str(init)))
    return path


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.arange(20)[None]).logits.numpy()


def theirs(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def saved(run: Path, step: int) -> set[str]:
    """The names of the parameters in a checkpoint, by orbax's folders."""
    text = (run / "checkpoints" / str(step) / "params" / "_METADATA").read_text()
    return {name for name in ("wte_VD", "q_DNH", "a_DR", "ln_f", "ln_1", "up_DF") if name in text}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft calls transformers by old names
def test_a_run_with_lora(workshop: runs.Workshop, here: runs.Here, tmp_path: Path, finished_gpt2: Path) -> None:
    import peft

    source = finished_gpt2 / "export"
    base = Path(shutil.copytree(source, tmp_path / "base"))
    part = 'LoRA(rank=4, alpha=8.0, dropout=0.1, targets=("attn/q", "attn/v", "mlp/*"))'
    run, made = tmp_path / "run", recipe(workshop, tmp_path, "gpt2", part, base)
    ended = here.train(made, "--run-dir", run)
    assert ended.code == 0, ended
    assert " trained, computing in" in ended.out
    assert saved(run, 4) == {"q_DNH", "a_DR", "up_DF"}  # parents of adapters; no other parameter
    metadata = read_metadata(run / "checkpoints", 4)
    assert metadata["base"]["source"] == str(base)
    # The end's export is merged, and so is the verb's; the adapter's folder gives PEFT the same logits on the base.
    merged = logits(theirs(run / "export"))
    assert here.cli("export", run, "--out", tmp_path / "merged", "--merge").code == 0
    np.testing.assert_array_equal(logits(theirs(tmp_path / "merged")), merged)
    ended = here.cli("export", run, "--out", tmp_path / "adapter", "--adapter")
    assert ended.code == 0, ended
    assert load_tokenizer(tmp_path / "adapter").fingerprint == load_tokenizer(run / "tokenizer").fingerprint
    peer = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "adapter")
    np.testing.assert_allclose(logits(peer), merged, atol=2e-5)
    assert np.abs(merged - logits(theirs(base))).max() > 1e-3
    assert here.cli("generate", run, "--prompt", "def ", "--max-new-tokens", 4).code == 0
    here.cli("export", run, "--out", tmp_path / "x", "--adapter", "--merge").refused("give one of them")
    here.cli("export", source.parent, "--out", tmp_path / "x", "--adapter").refused("trained with Full, not LoRA")
    # It goes on, but not beside other weights; a base that has moved is named.
    weights = theirs(base)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    weights.get_parameter("transformer.ln_f.bias").data[0] += 1
    weights.save_pretrained(base)
    here.train(made, "--run-dir", run, "--steps", 6).refused("holds other weights than the run was built on at step 4")
    here.cli("generate", run, "--prompt", "def ").refused("holds other weights")
    again = ("--run-dir", run, "--steps", 6, "--init", other)
    here.train(made, *again).refused("init was", "--resume-with-changes")
    ended = here.train(made, *again, "--resume-with-changes")
    assert ended.code == 0, ended
    assert "resuming from step 4" in ended.out


@pytest.mark.slow
def test_a_run_of_the_last_layers(workshop: runs.Workshop, here: runs.Here, tmp_path: Path, finished: Path) -> None:
    base = finished / "export"
    run, made = tmp_path / "run", recipe(workshop, tmp_path, "gptj", "LastLayers(layers=1)", base)
    ended = here.train(made, "--run-dir", run)
    assert ended.code == 0, ended
    assert saved(run, 4) == {"q_DNH", "up_DF", "ln_1", "ln_f"}
    before, after = (theirs(folder).state_dict() for folder in (base, run / "export"))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in after if name.startswith(("transformer.h.1.", "transformer.ln_f."))}
    # Resumed, it ends as it does uninterrupted.
    runs.drop_checkpoint(run, 4)
    (run / "export" / "model.safetensors").rename(tmp_path / "first.safetensors")
    assert here.train(made, "--run-dir", run).code == 0
    assert (run / "export" / "model.safetensors").read_bytes() == (tmp_path / "first.safetensors").read_bytes()


@pytest.mark.parametrize("part", [LoRA(), LastLayers()], ids=lambda part: type(part).__name__)
def test_a_part_needs_weights_to_start_from(part: Trainable, tmp_path: Path) -> None:
    run = Run(model=tiny.GPT2, data=Data(store="x"), steps=1, global_batch=8, trainable=part)
    with pytest.raises(UserError, match=rf"{type(part).__name__} trains a part .*--init"):
        adopt(run, RunFolder(tmp_path))


def test_no_layers_are_refused() -> None:
    with pytest.raises(UserError, match=r"trainable\.layers=0"):
        LastLayers(layers=0)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    ("config", "execution"),
    [(tiny.GPT2, Execution()), (tiny.GPTJ, Execution(unroll=0, remat="full"))],
    ids=["gpt2-scanned", "gptj-in-line"],
)
def test_last_layers_have_the_gradients_of_the_whole(config: ModelConfig, execution: Execution, layers: int) -> None:
    whole = Run(model=config, data=Data(store="x"), steps=1000, global_batch=8, execution=execution)
    last = dataclasses.replace(whole, trainable=LastLayers(layers=layers), init="x")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with jax.set_mesh(tiny.mesh(1, 2, 2)):
            found = {}
            for run in (whole, last):
                tokens, weights = (a[0] for a in tiny.batch(tiny.tokens(8, 13)))
                state, frozen = Program(run=run).start(tiny.params(config))
                loss = Program(run=run)._loss(frozen, run.objective)
                gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
                (total, _), grads = gradient(state.params, tokens, weights, None)
                found[type(run.trainable)] = float(total), tiny.to_numpy(grads)
            assert isinstance(last.trainable, LastLayers)
            merged = last.trainable.merged(state.params, frozen)
            tiny.assert_same_bits(merged, tiny.params(config))
            assert [leaf.sharding for _, leaf in trees.leaves_with_names(merged)] == [
                leaf.sharding for _, leaf in trees.leaves_with_names(tiny.params(config))
            ]
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    assert found[LastLayers][0] == pytest.approx(found[Full][0], rel=1e-6)
    for name, value in found[LastLayers][1].items():
        expected = found[Full][1][name]
        expected = expected[-layers:] if name.startswith("blocks/") else expected
        if "k_bias" in name:  # which moves all of a row's scores alike, and so nothing
            assert np.abs(value).max() < 1e-6
        else:
            tiny.assert_close(value, expected, 1e-4, name)
