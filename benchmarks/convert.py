"""Hugging Face in and out: peak memory and speed, beside a plain save and load of transformers.

    python benchmarks/convert.py gpt2-xl            # 3 GB in bfloat16, about a minute on two cores
    python benchmarks/convert.py gptj-8-layers      # 4 GB; GPT-J 6B but for its depth, on which no excess depends
    python benchmarks/convert.py gptj-6b            # 12 GB on disk and in memory: wants 20 GB of RAM, 40 GB of disk

Every task runs in a process of its own on one device. Random weights are made first, in bfloat16. What counts, in GiB:
`before` the resident memory as the task begins (libraries, and for an export the live parameters), `peak` the highest
of its resident memory (`VmHWM`: pages of memory-mapped files are in it, though the system may take them back). Import
is to stay below the parameters and the largest tensor; export below 2.5 GiB above the live parameters. GB/s is the
size of the checkpoint over the time of the task; `export` is the writing alone, `export, proved` with the comparison of
every tensor and of the logits, which ends with the parameters loaded a second time.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TypedDict

import record

SHAPES = {
    "gpt2": {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-xl": {"model_type": "gpt2", "n_layer": 48, "n_head": 25, "n_embd": 1600},
    "gptj-8-layers": {"model_type": "gptj", "n_layer": 8, "n_head": 16, "n_embd": 4096, "rotary_dim": 64},
    "gptj-6b": {"model_type": "gptj", "n_layer": 28, "n_head": 16, "n_embd": 4096, "rotary_dim": 64},
}
TASKS = ("import", "export", "load of transformers", "save of transformers")
GIB = 2**30


def make(shape: str, folder: Path) -> None:
    """Random weights in the Hugging Face format, one tensor at a time."""
    import ml_dtypes
    import numpy as np

    from meshgpt import convert
    from meshgpt.convert import safetensor
    from meshgpt.convert.hf_names import stored_tensors

    folder.mkdir()
    name = {"gpt2": "GPT2LMHeadModel", "gptj": "GPTJForCausalLM"}[SHAPES[shape]["model_type"]]
    (folder / "config.json").write_text(json.dumps(SHAPES[shape] | {"architectures": [name]}))
    tensors = stored_tensors(convert.read_config(folder))
    dtype = np.dtype(ml_dtypes.bfloat16)
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(2**22, np.float32) * 0.02).astype(dtype)
    with safetensor.Writer(folder / "model.safetensors", [(t.name, t.shape) for t in tensors], dtype) as writer:
        for tensor in tensors:
            size = math.prod(tensor.shape)
            start = int(rng.integers(0, 1000))
            writer.add(tensor.name, np.resize(noise[start:], size).reshape(tensor.shape))


def resident(entry: str) -> float:
    """VmRSS or VmHWM of this process, GiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1]) / 2**20


class Row(TypedDict):
    """A line of the table: GiB, seconds, GB/s."""

    task: str
    before: float
    peak: float
    seconds: float
    rate: float
    note: str


class Watch:
    """Time and memory from its making on."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident now
        self.before, self.start = resident("VmRSS"), time.perf_counter()

    def row(self, task: str, total: int) -> Row:
        seconds = time.perf_counter() - self.start
        peak = resident("VmHWM")
        rate = total / seconds / 1e9
        return {"task": task, "before": self.before, "peak": peak, "seconds": seconds, "rate": rate, "note": ""}


def ours(task: str, folder: Path) -> list[Row]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from meshgpt import convert, trees
    from meshgpt.data.tokenizer import train_bpe
    from meshgpt.distributed.mesh import MeshShape, make_mesh
    from meshgpt.models.model import Model
    from meshgpt.models.precision import Precision

    with jax.set_mesh(make_mesh(MeshShape())):
        source = convert.open_source(str(folder))
        model = Model(config=source.config, precision=Precision(params="bfloat16", compute="float32"))
        abstract = _placed(model.abstract_params())
        # XLA's compiler is a part of the program that is loaded at its first use.
        jax.block_until_ready(jax.jit(lambda x: jnp.sort(x @ x))(jnp.ones((64, 64))))
        watch = Watch()
        params = jax.block_until_ready(source.load(abstract))
        total = trees.nbytes(params)
        row = watch.row("import", total)
        if task == "import":
            largest = max(math.prod(entry.shape) * 2 for entry in source.tensors.entries.values())
            more, allowed = row["peak"] - row["before"], (total + largest) / GIB
            row["note"] = f"{more:.2f} above before; parameters and the largest tensor are {allowed:.2f}"
            return [row]

        def logits(params: trees.Tree, tokens_BT: jax.Array) -> jax.Array:
            decoder = model.bind(params)
            return decoder.logits(decoder.hidden(tokens_BT))

        written: list[float] = []
        watch = Watch()
        convert.export(
            params,
            source.config,
            train_bpe(["measured"], 300),
            folder.with_name("exported"),
            probe=convert.Probe(
                tokens_BT=np.arange(16, dtype=np.int32)[None],
                logits=jax.jit(logits, compiler_options=convert.PROBE_COMPILER_OPTIONS),
            ),
            dtype="bfloat16",
            release=True,
            on_progress=lambda done, total: written.append(time.perf_counter() - watch.start),
        )
        proved = watch.row("export, proved", total)
        proved["note"] = f"{proved['peak'] - proved['before']:.2f} above the live parameters; allowed 2.50"
        seconds = written[-1]
        return [{**proved, "task": "export", "seconds": seconds, "rate": total / seconds / 1e9, "note": ""}, proved]


def _placed(abstract: object) -> object:
    import jax

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        assert leaf.sharding is not None
        sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, abstract)


def theirs(task: str, folder: Path) -> list[Row]:
    import torch
    import transformers

    total = (folder / "model.safetensors").stat().st_size
    watch = Watch()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():  # what is only mapped was not loaded yet
        sum(float(parameter.sum()) for parameter in model.parameters())
    row = watch.row("load of transformers", total)
    if task.startswith("load"):
        return [row]
    watch = Watch()
    model.save_pretrained(folder.with_name("saved"), max_shard_size="5GB")
    return [watch.row("save of transformers", total)]


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--folder", type=Path, help="where there is room (default: the system's temporary folder)")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.task is not None:
        rows = (theirs if "transformers" in asked.task else ours)(asked.task, asked.folder)
        print(json.dumps(rows))
        return
    begun = record.begin("convert", asked)
    measured: dict[str, Any] = {}
    for shape in asked.shapes:
        with tempfile.TemporaryDirectory(dir=asked.folder) as room:
            folder = Path(room) / "model"
            make(shape, folder)
            size = (folder / "model.safetensors").stat().st_size / 1e9
            measured[shape] = {"gigabytes": size, "rows": (rows := list[Row]()), "failed": (failed := list[str]())}
            print(f"{shape}, {size:.2f} GB in bfloat16")
            print(f"  {'':<22}{'before':>8}{'peak':>8}{'seconds':>9}{'GB/s':>7}")
            for task in TASKS:
                found = _measured(task, shape, folder)
                rows += found
                failed += [] if found else [task]
                for name in ("exported", "saved"):
                    shutil.rmtree(Path(room) / name, ignore_errors=True)
    begun.write(measured, {"transformers": record.versions_of("torch", "transformers")})


def _measured(task: str, shape: str, folder: Path) -> list[Row]:
    """Of a process of its own, and printed; none if it failed."""
    command = [sys.executable, __file__, shape, "--task", task, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, text=True)
    if done.returncode:
        print(f"  {task:<22} failed with {done.returncode}", flush=True)
        return []
    rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
    for row in rows:
        figures = f"{row['before']:8.2f}{row['peak']:8.2f}{row['seconds']:9.1f}{row['rate']:7.2f}"
        print(f"  {row['task']:<22}{figures}  {row['note']}", flush=True)
    return rows


if __name__ == "__main__":
    main()
