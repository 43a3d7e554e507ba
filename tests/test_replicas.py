"""Copies of an array on several devices: that a changed bit in one of them is found, named, and not saved."""

import dataclasses
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import runs
from jax.sharding import PartitionSpec
from runs import Here, Workshop

from meshgpt.distributed.batch import fetch
from meshgpt.distributed.mesh import spec
from meshgpt.distributed.replicas import ReplicaCheck, digests, digests_every
from meshgpt.errors import MachineError, exit_code
from meshgpt.training import loop

OnMesh = Callable[..., AbstractContextManager]


def corrupted(x: jax.Array, place: int, element: int = 0, bit: int = 3) -> jax.Array:
    """x with one bit changed in the copy that the device at `place` holds."""
    shards = sorted(x.addressable_shards, key=lambda shard: shard.device.id)
    parts = []
    for number, shard in enumerate(shards):
        data = np.array(shard.data)
        if number == place:
            data.reshape(-1).view(np.uint8)[element * data.itemsize + bit // 8] ^= 1 << bit % 8
        parts.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)


def state(seed: int = 0) -> dict:
    """Sharded along every axis, along none, and in several dtypes."""
    draw = np.random.default_rng(seed).normal(size=(8, 16)).astype(np.float32)
    put = jax.device_put
    return {
        "params": {
            "w_DF": put(draw, spec("fsdp mlp")),
            "scale_D": put(draw[0], spec("_")),
            "half_DF": put(draw.astype(ml_dtypes.bfloat16), spec("fsdp _")),
        },
        "opt_state": {"codes": put(draw.view(np.uint8), spec("_ _"))},
        "step": put(jnp.int32(7), PartitionSpec()),
    }


def test_equal_copies_pass_and_every_changed_bit_is_found(on_mesh: OnMesh):
    with on_mesh(4, 2, 1):
        good = state()
        check = ReplicaCheck(5, jax.sharding.get_mesh(), good)
        check.compare(5, good)
        for bit in (0, 12, 31):
            for element in (0, 1, 63):
                bad = {**good, "params": {**good["params"], "w_DF": corrupted(good["params"]["w_DF"], 5, element, bit)}}
                with pytest.raises(MachineError, match=r"after step 5: process 0, device 5 .*data=2 fsdp=1 tensor=0"):
                    check.compare(5, bad)
        for path, leaf in (("opt_state/codes", "codes"), ("step", "step")):
            bad = {**good, "step": corrupted(good["step"], 3)} if leaf == "step" else good
            if leaf == "codes":
                bad = {**good, "opt_state": {"codes": corrupted(good["opt_state"]["codes"], 3, 20)}}
            with pytest.raises(MachineError, match=rf"device 3 .* the 8 copies of {path}\b"):
                check.compare(5, bad)


def test_of_two_copies_both_are_named(on_mesh: OnMesh):
    with on_mesh(2, 2, 2):
        good = state()
        check = ReplicaCheck(1, jax.sharding.get_mesh(), good)
        bad = {**good, "params": {**good["params"], "w_DF": corrupted(good["params"]["w_DF"], 6)}}
        with pytest.raises(
            MachineError, match=r"device 2 .*; process 0, device 6 .* do not hold the same bits, of the 2"
        ):
            check.compare(3, bad)


def test_without_copies_or_unasked_nothing_is_said(on_mesh: OnMesh):
    with on_mesh(1, 8, 1):
        x = jax.device_put(np.ones((8, 4), np.float32), spec("fsdp _"))
        ReplicaCheck(1, jax.sharding.get_mesh(), {"params": {"w": x}}).compare(1, {"params": {"w": corrupted(x, 3)}})
    with on_mesh(8, 1, 1):
        x = jax.device_put(np.ones((8, 4), np.float32), spec("_ _"))
        unasked = ReplicaCheck(0, jax.sharding.get_mesh(), {"params": {"w": x}})
        unasked.compare(1, {"params": {"w": corrupted(x, 3)}})
        assert not unasked.due(0)
        asked = ReplicaCheck(4, jax.sharding.get_mesh(), {"params": {"w": x}})
        assert [step for step in range(1, 10) if asked.due(step)] == [4, 8]


def test_a_digest_is_the_weighted_sum_of_words(on_mesh: OnMesh):
    with on_mesh(2, 1, 4):
        x = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
        placed = jax.device_put(x, spec("_ mlp"))
        found_PK = fetch(jax.jit(digests)([placed]))
        for place in range(8):
            words = x[:, place % 4 * 2 : place % 4 * 2 + 2].reshape(-1).view(np.uint32).astype(np.uint64)
            wanted = int((words * (2 * np.arange(8, dtype=np.uint64) + 1)).sum() % 2**32)
            assert int(found_PK[place, 0]) == wanted
        every = jax.jit(lambda x, step: digests_every(3, [x], step))
        np.testing.assert_array_equal(fetch(every(placed, jnp.int32(6))), found_PK)
        assert not fetch(every(placed, jnp.int32(7))).any()


FLAGS = ("--check-replicas-every", 3, "--samples.prompts", "def ", "--export", "none", "--steps", 8)


def test_a_run_with_checks_computes_what_one_without_does(workshop: Workshop, here: Here, tmp_path: Path):
    recipe = workshop.recipe(tmp_path)
    for name, every in (("with", 3), ("without", 0)):
        flags = (*FLAGS, "--check-replicas-every", every, "--mesh.data", 4, "--mesh.fsdp", 2)
        ended = here.train(recipe, "--run-dir", tmp_path / name, *flags)
        assert ended.code == 0, ended
    assert runs.losses(tmp_path / "with") == runs.losses(tmp_path / "without")
    ours, theirs = (runs.saved_params(tmp_path / name, 8) for name in ("with", "without"))
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    assert all("inspected" not in row for row in runs.rows(tmp_path / "with"))


@pytest.mark.parametrize(
    ("at", "found", "saved"),
    [
        (2, "after step 3", []),  # by the check itself
        (4, "after step 5", []),  # before the save of step 5
        (7, "after step 8", ["5"]),  # before the last save
    ],
)
def test_a_corrupted_replica_ends_the_run_and_is_not_saved(
    workshop: Workshop, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, found: str, saved: list
):
    def corrupt(program, step, *arguments, compile_it=loop.compile_fitting):
        compiled = compile_it(program, step, *arguments)

        def one(state, *rest):
            if int(state.step) == at:
                params = dict(state.params)
                params["wte_VD"] = corrupted(params["wte_VD"], 5, bit=1)
                state = dataclasses.replace(state, params=params)
            return compiled(state, *rest)

        return one

    monkeypatch.setattr(loop, "compile_fitting", corrupt)
    run = tmp_path / "run"
    ended = here.train(workshop.recipe(tmp_path), "--run-dir", run, *FLAGS, "--mesh.data", 8)
    assert ended.code == 3, ended
    assert f"silent corruption, {found}" in ended.err
    assert "process 0, device 5" in ended.err
    assert "Traceback" not in ended.err
    assert sorted(path.name.split(".")[0] for path in run.glob("checkpoints/*.digests.json")) == saved
    assert json.loads((run / "run.json").read_text())["finished_step"] is None


def test_gradients_that_differ_are_named(on_mesh: OnMesh):
    with on_mesh(4, 2, 1):
        good = state()
        check = ReplicaCheck(2, jax.sharding.get_mesh(), good)
        gradients = [corrupted(good["params"]["half_DF"], 2), good["params"]["scale_D"], good["params"]["w_DF"]]
        found_PK = fetch(jax.jit(digests)(gradients))
        check.compare_gradients(3, found_PK)  # not a step that is looked at
        with pytest.raises(MachineError, match=r"the gradients of step 4: process 0, device 2 .* 4 copies of half_DF"):
            check.compare_gradients(4, found_PK)


def test_a_machines_fault_has_its_own_exit_code(capsys: pytest.CaptureFixture[str]):
    def fail() -> None:
        raise MachineError("device 3 is broken")

    assert exit_code(fail) == 3
    assert capsys.readouterr().err == "error: device 3 is broken\n"


def test_a_negative_interval_is_refused(here: Here, workshop: Workshop, tmp_path: Path):
    here.train(workshop.recipe(tmp_path), "--check-replicas-every", "-1").refused("--check-replicas-every -1")
