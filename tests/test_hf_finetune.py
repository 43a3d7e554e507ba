"""The fine-tuning recipes, from a small random Hugging Face folder."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from hf_peers import GPT2_TINY, GPTJ_TINY, live, peer

from meshgpt import convert, recipe
from meshgpt.convert.adam_state import Moments
from meshgpt.distributed.mesh import spec
from meshgpt.errors import UserError
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.gptj import GPTJConfig
from meshgpt.models.model import Model
from meshgpt.objectives.loss import NextToken, next_token_loss
from meshgpt.optim.config import AdamW, AdamW8bit, Lion
from meshgpt.training.step import from_params, make_eval_step, make_train_step

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = pytest.mark.parametrize(
    ("name", "config"), [("gpt2_finetune", GPT2_TINY), ("gptj_6b_finetune", GPTJ_TINY)], ids=["gpt2", "gptj"]
)


@pytest.mark.slow
@RECIPES
def test_recipe_starts_at_the_weights_loss_and_lowers_it(name, config, tmp_path):
    run = recipe.load(CONFIGS / f"{name}.py")
    assert isinstance(run.model, GPTJConfig) == isinstance(config, GPTJConfig)
    other = peer(config)
    other.save_pretrained(tmp_path)
    source = convert.open_source(str(tmp_path))
    model = Model(config=source.config, execution=dataclasses.replace(run.execution, attention="xla"))
    params = source.load(live(source.config)[0])
    tokens = np.random.default_rng(0).integers(0, 97, (run.accumulate, 8, 13), dtype=np.int32)
    weights = jax.device_put(np.ones((run.accumulate, 8, 12), np.float32), spec("_ batch seq"))
    batch = jax.device_put(tokens, spec("_ batch seq"))
    loss = next_token_loss(model, NextToken())
    total, count = jax.jit(make_eval_step(loss))(params, batch[0], weights[0])
    labels = torch.tensor(tokens[0], dtype=torch.long)
    with torch.no_grad():
        wanted = float(other(labels, labels=labels).loss)
    assert float(total / count) == pytest.approx(wanted, abs=1e-4)
    state = from_params(params, run.optim)
    step = jax.jit(make_train_step(next_token_loss(model, run.objective), run.optim, run.steps, None), donate_argnums=0)
    losses = []
    for _ in range(8):
        # Late in the warmup, so that a few steps are seen to do something.
        state = dataclasses.replace(state, step=jax.numpy.int32(run.optim.warmup_steps))
        state, metrics = step(state, batch, weights)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 1e-4
    assert int(state.skipped) == 0


def test_moments_go_only_where_they_fit():
    # Large enough that eight bits pay: small tensors are kept in float32 whatever the optimizer.
    params, _ = live(GPT2Config(vocab_size=128, n_positions=64, n_layers=1, n_heads=2, d_model=128))
    moments = Moments(mu=params, nu=params, count=5)
    kept = from_params(params, AdamW(moment_dtype="bfloat16")).opt_state
    with pytest.raises(UserError, match="bfloat16"):
        moments.into(kept)
    for optim in (AdamW8bit(), Lion()):
        with pytest.raises(UserError, match="continue with AdamW"):
            moments.into(from_params(params, optim).opt_state)
