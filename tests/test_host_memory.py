"""States and activations that wait in the host's memory: where they lie, and that nothing else changes.

JAX on CPU tells the memories apart, though both are the host's; what a device saves shows on a GPU or a TPU only.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from meshgpt.checkpoint import orbax_io
from meshgpt.distributed import host_memory
from meshgpt.errors import UserError
from meshgpt.models.layers import Execution
from meshgpt.objectives.loss import NextToken, next_token_loss
from meshgpt.optim.config import AdamW, AdamW8bit, Constant, Optimizer, resting
from meshgpt.training.step import TrainState, from_params, make_train_step


def kinds(tree: Any) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}


def steps(optim: Optimizer, execution: Execution = Execution()) -> tuple[TrainState, list[float]]:
    with jax.set_mesh(tiny.mesh(1, 2, 2)):
        model = tiny.model(tiny.GPT2, execution)
        step = jax.jit(make_train_step(next_token_loss(model, NextToken()), optim, 3, None), donate_argnums=0)
        state, losses = jax.jit(lambda p: from_params(p, optim))(tiny.params(tiny.GPT2)), []
        before = kinds(state.opt_state)
        for index in range(3):
            state, metrics = step(state, *tiny.batch(tiny.tokens(4, 9, index)))
            losses.append(float(metrics["loss"]))
        assert kinds(state.opt_state) == before
        assert step._cache_size() == 1, "the state comes out as it went in"
    return state, losses


OPTIM = AdamW(peak_lr=1e-2, warmup_steps=0, schedule=Constant())


@pytest.mark.parametrize("optim", [OPTIM, AdamW8bit(peak_lr=1e-2, warmup_steps=0)], ids=lambda o: type(o).__name__)
def test_a_paged_state_rests_on_the_host_and_changes_nothing(optim: Optimizer, tmp_path: Path) -> None:
    plain, losses = steps(optim)
    paged_optim = dataclasses.replace(optim, state_memory="pinned_host")
    paged, paged_losses = steps(paged_optim)
    assert kinds(plain.opt_state) == {"device"}
    assert kinds(paged.opt_state) == {"pinned_host"}
    assert kinds(paged.params) == {"device"}
    assert paged_losses == losses
    tiny.assert_same_bits(paged.opt_state, plain.opt_state)
    with jax.set_mesh(tiny.mesh(1, 1, 4)):
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as saver:
            saver.save(tmp_path / "0", args=ocp.args.Composite(**orbax_io.save_args(paged.items())))
        fresh = jax.eval_shape(lambda: from_params(tiny.model(tiny.GPT2).init(jax.random.key(0)), paged_optim))
        abstract = dataclasses.replace(fresh, opt_state=resting(paged_optim, fresh.opt_state))
        again = orbax_io.restore(tmp_path / "0", abstract.items())
        assert kinds(again["opt_state"]) == {"pinned_host"}
        tiny.assert_same_bits(again["opt_state"], paged.opt_state)


@pytest.mark.parametrize("unroll", [0, 1])
def test_offloaded_activations_change_nothing(unroll: int) -> None:
    _, plain = steps(OPTIM, Execution(unroll=unroll, remat="named"))
    _, offloaded = steps(OPTIM, Execution(unroll=unroll, remat="offload"))
    assert offloaded == pytest.approx(plain, rel=1e-6)


def test_offloaded_activations_are_on_the_host_in_between() -> None:
    with jax.set_mesh(tiny.mesh()):
        model = tiny.model(tiny.GPT2, Execution(unroll=0, remat="offload"))
        loss = next_token_loss(model, NextToken())
        tokens, weights = (a[0] for a in tiny.batch(tiny.tokens(2, 9)))
        text = str(
            jax.make_jaxpr(lambda p: jax.grad(loss, has_aux=True)(p, tokens, weights, None))(tiny.params(tiny.GPT2))
        )
    assert "<host>" in text


def test_devices_that_cannot_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        kind = "device"

    class Device:
        device_kind = "abacus"

        def addressable_memories(self) -> list[Memory]:
            return [Memory()]

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    with pytest.raises(UserError, match="a abacus addresses device only; take named"):
        host_memory.require("execution.remat=offload", "take named")
    with pytest.raises(UserError, match="AdamW8bit"):
        AdamW(state_memory="pinned_host").transformation()


def test_scalars_stay_where_they_are() -> None:
    moved = jax.jit(host_memory.to_host)({"count": jnp.int32(3), "m": jnp.ones(4)})
    assert moved["count"].sharding.memory_kind == "device"
    assert moved["m"].sharding.memory_kind == "pinned_host"
    np.testing.assert_array_equal(jax.jit(host_memory.to_device)(moved)["m"], np.ones(4))
