"""Saving and restoring at GPT-J 6B's shapes, cut in depth to what this machine holds, by several processes.

    python benchmarks/checkpoint.py --folder /tmp/checkpoint                  # one layer: 614M parameters, 7.4 GB
    python benchmarks/checkpoint.py --folder /tmp/checkpoint --layers 1 --d-model 1024 --vocab 8192 --heads 8

Starts N processes on this machine (4), fsdp over all of them, that save a state (parameters and both moments of AdamW
in float32, random numbers), then N new ones that restore it, with the files dropped from the page cache. Prints what
each process needs for its shards, what it read for that (/proc/self/io, rchar), and how long saving, checking the
digests and restoring took. `--restore-processes M` restores with another number.
"""

import argparse
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import record
from jax.sharding import PartitionSpec

from meshgpt import runtime
from meshgpt.checkpoint.manager import Checkpointer, Checkpointing
from meshgpt.config import Data, Run
from meshgpt.distributed import processes as hosts
from meshgpt.distributed.mesh import MeshShape, make_mesh
from meshgpt.models.gptj import GPTJConfig
from meshgpt.training.program import Program

STEP = 1
ORBAX = "orbax-checkpoint"


def parse() -> argparse.Namespace:
    parser = record.parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--d-model", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=50400)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--restore-processes", type=int, default=0)
    parser.add_argument("--part", choices=("save", "restore"), help=argparse.SUPPRESS)
    return parser.parse_args()


def shapes(asked: argparse.Namespace) -> dict[str, Any]:
    model = GPTJConfig(
        vocab_size=asked.vocab, n_positions=2048, n_layers=asked.layers, n_heads=asked.heads, d_model=asked.d_model,
        rotary_dim=min(64, asked.d_model // asked.heads),
    )  # fmt: skip
    return Program(run=Run(model=model, data=Data(), steps=1, global_batch=1)).abstract().items()


def spec_of(leaf: jax.ShapeDtypeStruct) -> PartitionSpec:
    return PartitionSpec() if leaf.sharding is None else leaf.sharding.spec


def random_state(abstract: dict[str, Any]) -> dict[str, Any]:
    """Numbers that no codec makes smaller."""
    leaves, structure = jax.tree.flatten(abstract)

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def make(shape: tuple[int, ...], dtype: Any, sharding: PartitionSpec, key: jax.Array) -> jax.Array:
        if not shape:
            return jnp.zeros((), dtype)
        words = jax.random.bits(key, shape, jnp.uint32, out_sharding=sharding)
        return jax.lax.bitcast_convert_type(words & jnp.uint32(0xBFFFFFFF), dtype)  # finite

    keys = list(jax.random.split(jax.random.key(0), len(leaves)))
    made = [make(leaf.shape, leaf.dtype, spec_of(leaf), key) for leaf, key in zip(leaves, keys, strict=True)]
    return structure.unflatten(made)


def share(abstract: dict[str, Any], mesh: jax.sharding.Mesh) -> int:
    """Bytes that this process's devices hold, each slice once."""
    total = 0
    for leaf in jax.tree.leaves(abstract):
        sharding = jax.sharding.NamedSharding(mesh, spec_of(leaf))
        slices = {str(index) for index in sharding.addressable_devices_indices_map(leaf.shape).values()}
        rows = sharding.shard_shape(leaf.shape)
        total += len(slices) * leaf.dtype.itemsize * functools.reduce(lambda a, b: a * b, rows, 1)
    return total


def characters_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar:")).split()[1])


def part(asked: argparse.Namespace) -> None:
    """What one process does."""
    runtime.take_turns()
    with hosts.distributed_session(hosts.process_spec({}), lambda text: None):
        mesh = make_mesh(MeshShape(data=1, fsdp=-1))
        with jax.set_mesh(mesh), Checkpointer(asked.folder / "checkpoints", Checkpointing(), report=print) as saver:
            abstract = shapes(asked)
            found: dict[str, Any] = {"process": jax.process_index(), "share": share(abstract, mesh)}
            if asked.part == "save":
                state = jax.block_until_ready(random_state(abstract))
                begun = time.monotonic()
                saver.save(STEP, state, {})
                found["blocked_seconds"] = time.monotonic() - begun
                saver.wait()
                found["seconds"] = time.monotonic() - begun
            else:
                before, begun = characters_read(), time.monotonic()
                if saver.latest() != STEP:
                    raise RuntimeError("the checkpoint is not intact")
                found["digests_seconds"] = time.monotonic() - begun
                found["digests_read"] = characters_read() - before
                before, begun = characters_read(), time.monotonic()
                jax.block_until_ready(saver.restore(STEP, abstract))
                found["seconds"] = time.monotonic() - begun
                found["read"] = characters_read() - before
            (asked.folder / f"{asked.part}-{jax.process_index()}.json").write_text(json.dumps(found))


def pod(asked: argparse.Namespace, name: str, processes: int) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "MESHGPT_COORDINATOR": f"127.0.0.1:{port}", "MESHGPT_PROCESSES": str(processes), "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
    }  # fmt: skip
    command = [sys.executable, __file__, *sys.argv[1:], "--part", name]
    running = [
        subprocess.Popen(command, env=environment | {"MESHGPT_PROCESS_ID": str(number)}) for number in range(processes)
    ]
    try:
        codes = [process.wait() for process in running]
    finally:
        for process in running:
            process.kill()
    if any(codes):
        raise SystemExit(f"the processes that {name} ended with codes {codes}")
    return [json.loads((asked.folder / f"{name}-{number}.json").read_text()) for number in range(processes)]


def drop_from_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    asked = parse()
    if asked.part:
        runtime.start()
        part(asked)
        return
    begun = record.begin("checkpoint", asked)
    shutil.rmtree(asked.folder / "checkpoints", ignore_errors=True)
    asked.folder.mkdir(parents=True, exist_ok=True)
    saved = pod(asked, "save", asked.processes)
    on_disk = sum(path.stat().st_size for path in (asked.folder / "checkpoints").rglob("*") if path.is_file())
    drop_from_cache(asked.folder / "checkpoints")
    restored = pod(asked, "restore", asked.restore_processes or asked.processes)
    print(f"state {sum(one['share'] for one in saved) / 1e9:.2f} GB, on disk {on_disk / 1e9:.2f} GB")
    for one in saved:
        print(
            f"save     process {one['process']}: blocked {one['blocked_seconds']:.2f} s, in all {one['seconds']:.1f} s"
        )
    for one in restored:
        print(
            f"restore  process {one['process']}: needs {one['share'] / 1e6:,.1f} MB, read {one['read'] / 1e6:,.1f} MB "
            f"({one['read'] / one['share']:.3f}) in {one['seconds']:.1f} s; digests: "
            f"{one['digests_read'] / 1e6:,.1f} MB in {one['digests_seconds']:.1f} s"
        )
    begun.write({"on_disk": on_disk, "saved": saved, "restored": restored}, {"orbax": record.versions_of(ORBAX)})


if __name__ == "__main__":
    main()
