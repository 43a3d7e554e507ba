"""The training step: the same on every mesh, against PyTorch's AdamW, and proof against bad batches."""

import dataclasses
import functools
import re
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from meshgpt import trees
from meshgpt.models.model import ModelConfig
from meshgpt.objectives.loss import Loss, NextToken, next_token_loss
from meshgpt.optim.config import AdamW, Constant, Cosine
from meshgpt.training.step import TrainState, from_params, make_eval_step, make_train_step

ROWS, LENGTH, STEPS = 8, 8, 6
# eps is large for Adam: its direction is g / |g| otherwise, which magnifies the rounding of gradients that are zero.
OPTIM = AdamW(peak_lr=1e-2, warmup_steps=2, schedule=Cosine(), eps=1e-4, clip_norm=0.7)
# On CPU a sum over more devices is a sum in another order; the losses show how far that carries.
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]

Step = Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


def compiled(loss: Loss, optim: AdamW = OPTIM, dropout_key: jax.Array | None = None) -> Step:
    return jax.jit(make_train_step(loss, optim, STEPS, dropout_key), donate_argnums=0)


def rows_of(step: int) -> np.ndarray:
    return tiny.tokens(ROWS, LENGTH + 1, seed=step)


@functools.cache
def train(config: ModelConfig, mesh: tuple[int, int, int], accumulate: int = 1) -> tuple[list[dict], dict]:
    """Metrics of six steps, and the parameters after them."""
    with jax.set_mesh(tiny.mesh(*mesh)):
        step = compiled(next_token_loss(tiny.model(config), NextToken(z_loss=1e-3, chunk_tokens=12)))
        state, metrics = from_params(tiny.params(config), OPTIM), []
        for index in range(STEPS):
            state, metric = step(state, *tiny.batch(rows_of(index), accumulate))
            metrics.append({name: float(value) for name, value in metric.items()})
        assert int(state.step) == STEPS
        return metrics, tiny.to_numpy(state.params)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("config", tiny.FAMILIES, ids=tiny.name)
def test_the_same_six_losses_on_every_mesh(config: ModelConfig, mesh: tuple[int, int, int]) -> None:
    expected, one = train(config, (1, 1, 1))
    got, params = train(config, mesh)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-5), name
    for name, value in one.items():
        tiny.assert_close(params[name], value, 1e-3, name)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_accumulation_equals_the_large_batch(mesh: tuple[int, int, int]) -> None:
    large, params = train(tiny.GPT2, (1, 1, 1))
    small, others = train(tiny.GPT2, mesh, accumulate=2)
    for ours, theirs in zip(small, large, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for name, value in params.items():
        tiny.assert_close(others[name], value, 1e-3, name)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_with_z_loss_the_loss_is_still_nats_a_token(torch: ModuleType, accumulate: int) -> None:
    """`loss` is PyTorch's cross-entropy, `objective` that and 1e-3 times the squared log of the normaliser."""
    tokens = torch.from_numpy(rows_of(0)).long()
    with torch.no_grad():
        logits = tiny.torch_peer(tiny.GPT2)(tokens[:, :-1]).logits.double()
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    squares = logits.logsumexp(-1).square().mean().item()
    first = train(tiny.GPT2, (1, 1, 1) if accumulate == 1 else (2, 2, 2), accumulate)[0][0]
    assert first["loss"] == pytest.approx(nats, rel=1e-5)
    assert first["objective"] == pytest.approx(nats + 1e-3 * squares, rel=1e-5)
    assert first["objective"] > first["loss"] * 1.001


@pytest.mark.parametrize("config", tiny.FAMILIES, ids=tiny.name)
def test_steps_equal_those_of_pytorch(torch: ModuleType, config: ModelConfig) -> None:
    """Against torch.optim.AdamW with clip_grad_norm_ and the same learning rates: losses, norms, and every tensor."""
    peer = tiny.torch_peer(config)
    decays = [p for p in peer.parameters() if p.ndim > 1]
    rest = [p for p in peer.parameters() if p.ndim <= 1]
    groups = [{"params": decays, "weight_decay": OPTIM.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(OPTIM.b1, OPTIM.b2), eps=OPTIM.eps)
    rates = [0.5 * OPTIM.peak_lr, OPTIM.peak_lr]
    rates += [OPTIM.peak_lr * (0.1 + 0.9 * (1 + np.cos(np.pi * t / 4)) / 2) for t in range(4)]
    with jax.set_mesh(tiny.mesh()):
        step = compiled(next_token_loss(tiny.model(config), NextToken()))
        state = from_params(tiny.params(config), OPTIM)
        for index, rate in enumerate(rates):
            state, metrics = step(state, *tiny.batch(rows_of(index)))
            tokens = torch.from_numpy(rows_of(index)).long()
            loss = peer(tokens, labels=tokens).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(peer.parameters(), OPTIM.clip_norm)
            assert norm > OPTIM.clip_norm, "the test clips"
            for group in adamw.param_groups:
                group["lr"] = rate
            adamw.step()
            adamw.zero_grad()
            assert float(metrics["learning_rate"]) == pytest.approx(rate, rel=1e-5)
            assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5), index
            assert "objective" not in metrics, "it would be the loss"
            assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-4), index
            if index in (0, len(rates) - 1):
                ours = tiny.stored(config, tiny.to_numpy(state.params))
                for name, parameter in peer.named_parameters():
                    tiny.assert_close(ours[name], parameter.detach().numpy(), 1e-4 * (index + 1), f"{index} {name}")


def _toy(params: dict, tokens: jax.Array, weights: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """A loss whose gradient is the tokens': sum over rows of w . token, and of a term that only 13 sets off."""
    x = tokens[:, :-1].astype(jnp.float32)
    bad = jnp.where(tokens[:, 0] == 13, jnp.nan, jnp.where(tokens[:, 0] == 14, jnp.inf, 0.0))
    # At 15 the loss is 0 and its derivative infinite.
    steep = jnp.sqrt(jnp.where(tokens[:, 0] == 15, params["w_DF"].sum() * 0.0, 1.0))
    return (weights * x * params["w_DF"]).sum() + bad.sum() + steep.sum(), weights.sum()


def _toy_batch(first: int) -> tuple[jax.Array, jax.Array]:
    return tiny.batch(np.array([[first, 2, 3, 4]] * 2, np.int32))


@pytest.mark.parametrize("first", [13, 14, 15], ids=["nan loss", "infinite loss", "nan gradient"])
def test_a_bad_batch_touches_nothing_but_the_counters(first: int) -> None:
    with jax.set_mesh(tiny.mesh()):
        step = compiled(_toy)
        state, _ = step(from_params({"w_DF": jnp.ones((1, 3))}, OPTIM), *_toy_batch(1))
        before = jax.tree.map(np.asarray, (state.params, state.opt_state))
        for count in (1, 2):
            state, metrics = step(state, *_toy_batch(first))
            tiny.assert_same_bits((state.params, state.opt_state), before)
            assert int(state.step) == 1 + count
            assert (int(metrics["skipped_steps"]), int(metrics["streak"])) == (count, count)
        state, metrics = step(state, *_toy_batch(1))
        assert (int(metrics["skipped_steps"]), int(metrics["streak"])) == (2, 0)
        assert (np.asarray(state.params["w_DF"]) != before[0]["w_DF"]).all()


def test_a_batch_of_no_weight_changes_nothing_and_is_not_a_bad_one() -> None:
    with jax.set_mesh(tiny.mesh()):
        tokens, weights = _toy_batch(1)
        state, metrics = compiled(_toy)(from_params({"w_DF": jnp.ones((1, 3))}, OPTIM), tokens, weights * 0)
    assert int(metrics["skipped_steps"]) == 0
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt_state))
    np.testing.assert_array_equal(state.params["w_DF"], 1)


def test_gradients_are_clipped_by_their_norm_together_or_not_at_all() -> None:
    """A first step of Adam with a huge eps is lr * g / eps: it shows the gradient that Adam was given."""
    mean = np.array([1, 2, 3]) / 3  # two rows of the tokens 1, 2, 3, over six weights
    for clip, expected in ((0.0, mean), (100.0, mean), (0.5, 0.5 * mean / np.linalg.norm(mean))):
        optim = AdamW(peak_lr=1.0, warmup_steps=0, schedule=Constant(), eps=1e6, weight_decay=0.0, clip_norm=clip)
        with jax.set_mesh(tiny.mesh()):
            state, metrics = compiled(_toy, optim)(from_params({"w_DF": jnp.zeros((1, 3))}, optim), *_toy_batch(1))
        np.testing.assert_allclose(-np.asarray(state.params["w_DF"])[0] * 1e6, expected, rtol=1e-4)
        assert float(metrics["grad_norm"]) == pytest.approx(np.linalg.norm(mean), rel=1e-6), "before clipping"


def test_weights_are_weights_and_tokens_are_counted(torch: ModuleType) -> None:
    """Twice the weights give the same mean loss and the same step; rows of weight zero do not exist."""
    config = tiny.GPT2
    with jax.set_mesh(tiny.mesh()):
        evaluate = jax.jit(make_eval_step(next_token_loss(tiny.model(config), NextToken())))
        tokens, weights = (a[0] for a in tiny.batch(rows_of(0)))
        total, count = evaluate(tiny.params(config), tokens, weights)
        half = weights * jnp.where(jnp.arange(ROWS) < 4, 1.0, 0.0)[:, None]
        first, counted = evaluate(tiny.params(config), tokens, half)
        double, doubled = evaluate(tiny.params(config), tokens, weights * 2)
    assert (int(count), int(counted), int(doubled)) == (ROWS * LENGTH, 4 * LENGTH, 2 * ROWS * LENGTH)
    assert float(double) == pytest.approx(2 * float(total), rel=1e-6)
    peer = tiny.torch_peer(config)
    rows = torch.from_numpy(rows_of(0)).long()
    assert float(total) == pytest.approx(peer(rows, labels=rows).loss.item() * ROWS * LENGTH, rel=1e-5)
    assert float(first) == pytest.approx(peer(rows[:4], labels=rows[:4]).loss.item() * 4 * LENGTH, rel=1e-5)


DROPPING = dataclasses.replace(tiny.GPT2, embd_dropout=0.2, attn_dropout=0.2, resid_dropout=0.2)


def test_dropout_is_a_function_of_its_key_on_any_mesh() -> None:
    losses = {}
    for mesh in ((1, 1, 1), (2, 2, 2)):
        with jax.set_mesh(tiny.mesh(*mesh)):
            loss = jax.jit(next_token_loss(tiny.model(DROPPING), NextToken()))
            tokens, weights = (a[0] for a in tiny.batch(rows_of(0)))
            params = tiny.params(DROPPING)
            assert "random" not in str(jax.make_jaxpr(loss)(params, tokens, weights, None)), "off without a key"
            losses[mesh] = [float(loss(params, tokens, weights, jax.random.key(seed))[0]) for seed in (0, 0, 1, 2)]
    first, again, *others = losses[1, 1, 1]
    assert first == again, "deterministic"
    assert len({first, *others}) == 3, "every key drops something else"
    assert losses[2, 2, 2] == pytest.approx(losses[1, 1, 1], rel=1e-5)


def test_every_step_and_microbatch_drops_something_else_and_none_without_a_key() -> None:
    """On one batch of two equal microbatches, with a learning rate too small to matter."""
    optim = dataclasses.replace(OPTIM, peak_lr=1e-12)
    half = rows_of(0)[: ROWS // 2]
    with jax.set_mesh(tiny.mesh()):
        model = tiny.model(DROPPING)
        batch, single = tiny.batch(np.concatenate([half, half]), 2), tiny.batch(half)
        loss = next_token_loss(model, NextToken())
        step, key = compiled(loss, optim, jax.random.key(0)), jax.random.fold_in(jax.random.key(0), 0)
        state, losses = from_params(tiny.params(DROPPING), optim), []
        for _ in range(2):
            state, metrics = step(state, *batch)
            losses.append(float(metrics["loss"]))
        micro = [
            float(jax.jit(loss)(tiny.params(DROPPING), *(a[0] for a in single), jax.random.fold_in(key, index))[0])
            for index in (0, 1)
        ]
    assert losses[0] != losses[1]
    assert micro[0] != micro[1]
    assert losses[0] == pytest.approx(sum(micro) / (ROWS * LENGTH), rel=1e-5)


def test_a_rate_of_zero_drops_nothing() -> None:
    with jax.set_mesh(tiny.mesh()):
        loss = jax.jit(next_token_loss(tiny.model(tiny.GPT2), NextToken()))
        tokens, weights = (a[0] for a in tiny.batch(rows_of(0)))
        with_key, _ = loss(tiny.params(tiny.GPT2), tokens, weights, jax.random.key(0))
        without, _ = loss(tiny.params(tiny.GPT2), tokens, weights, None)
    assert float(with_key) == float(without)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_the_whole_state_is_donated_and_used_again(mesh: tuple[int, int, int]) -> None:
    """Every array of the state going in is the memory of one coming out."""
    with jax.set_mesh(tiny.mesh(*mesh)):
        step = compiled(next_token_loss(tiny.model(tiny.GPTJ), NextToken()))
        state = from_params(tiny.params(tiny.GPTJ), OPTIM)
        program = step.lower(state, *tiny.batch(rows_of(0))).compile()
        (aliases,) = re.findall(r"input_output_alias=\{(.*?) \}", program.as_text())
        pairs = {(int(out), int(into)) for out, into in re.findall(r"\{(\d+)\}: \((\d+), \{\}", aliases)}
        assert pairs == {(index, index) for index in range(len(jax.tree.leaves(state)))}
        _, _ = step(state, *tiny.batch(rows_of(0)))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_state_as_checkpoints_keep_it_is_the_state() -> None:
    with jax.set_mesh(tiny.mesh()):
        state = from_params(tiny.params(tiny.GPTJ), OPTIM)
    again = TrainState(**state.items())
    tiny.assert_same_bits(again, state)
    assert trees.count(state.opt_state) == 2 * trees.count(state.params) + 2, "two moments, and a counter of each"
