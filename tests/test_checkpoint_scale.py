"""Checkpoints of large models: what each of several processes reads, and what the host keeps after many saves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT

ENVIRONMENT = {
    **os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}  # fmt: skip
METADATA_BYTES = 500_000  # what a restore reads beside the arrays, whatever their size


def measured(folder: Path, *flags: str) -> dict:
    """What `benchmarks/checkpoint.py` finds at 6B's shapes, cut in width to 22 MB a process."""
    command = [sys.executable, str(ROOT / "benchmarks" / "checkpoint.py"), "--folder", str(folder)]
    command += ["--d-model", "512", "--vocab", "4096", "--heads", "8", "--json", str(folder / "result.json"), *flags]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads((folder / "result.json").read_text())["figures"]


@pytest.mark.slow
@pytest.mark.parametrize(("saving", "restoring"), [(4, 4), (4, 2)])
def test_each_process_reads_what_its_shards_need(tmp_path: Path, saving: int, restoring: int):
    found = measured(tmp_path, "--processes", str(saving), "--restore-processes", str(restoring))
    whole = sum(process["share"] for process in found["saved"])
    assert whole > 80e6
    assert len(found["restored"]) == restoring
    for process in found["restored"]:
        assert process["share"] == pytest.approx(whole / restoring, rel=0.01)
        assert 0.95 * process["share"] < process["read"] < 1.2 * process["share"] + METADATA_BYTES, process
        assert process["digests_read"] < 1.3 * process["share"] + METADATA_BYTES, process  # files are of unlike sizes
    assert found["on_disk"] < 1.01 * whole + METADATA_BYTES


SAVES = """
import gc, json, sys
from pathlib import Path
import jax, jax.numpy as jnp
from meshgpt.checkpoint import Checkpointer, Checkpointing

def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
state = {"params": {"w": jnp.zeros((1024, 1024))}, "opt_state": {"mu": jnp.zeros((1024, 1024))}}
sizes = []
with Checkpointer(Path(sys.argv[1]), Checkpointing(every=1, keep=2), report=lambda line: None) as checkpoints:
    for number in range(1, 201):
        state = step(state)
        checkpoints.save(number, state, {"step": number})
        if number % 50 == 0:
            checkpoints.wait()
            sizes.append(resident())
print(json.dumps(sizes))
"""


@pytest.mark.slow
def test_the_hosts_memory_is_flat_over_200_saves(tmp_path: Path):
    """A copy of the state, 8 MB, kept in each save would be 1.2 GB more at the end than after 50."""
    ended = subprocess.run(
        [sys.executable, "-c", SAVES, str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    after_50, *_, after_200 = json.loads(ended.stdout.splitlines()[-1])
    assert after_200 - after_50 < 30e6, (after_50, after_200)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["199", "200"]
