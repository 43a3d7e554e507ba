"""A training step of ours beside every peer that is installed, taking turns in one run.

    python benchmarks/compare.py                                         # 12 x 384, 4 x 256 tokens, float32, on CPU
    python benchmarks/compare.py --shape 124m --rows 4 --length 256
    python benchmarks/compare.py --shape 124m --rows 64 --length 1024    # on a GPU: bfloat16
    python benchmarks/compare.py --shape gptj-6b --rows 8 --length 2048 --remat full --unroll 1
    ... --nanogpt PATH          a checkout of nanoGPT
    ... --flax-python PATH      the Python of an environment with transformers 4, for its Flax models

Peers: transformers' PyTorch model, eager and under torch.compile; nanoGPT's; transformers 4's Flax model. Each is a
process of its own that starts from the same weights and sees the same tokens; the work is the same: forward, loss,
backward, clipping by global norm, AdamW with decay of matrices only. The losses of the first three steps have to agree
before anything counts. Printed: medians with quartiles, tokens/s, MFU where the device's peak is known, peak memory
(of the process on CPU, of the device on a GPU), seconds from nothing to the first step, and the ratio to ours.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
SHAPES = {
    "small": ("gpt2", 12, 384, 6),
    "124m": ("gpt2", 12, 768, 12),
    "355m": ("gpt2", 24, 1024, 16),
    "774m": ("gpt2", 36, 1280, 20),
    "1.5b": ("gpt2", 48, 1600, 25),
    "gptj-6b": ("gptj", 28, 4096, 16),
}
TOLERANCE = {"float32": 2e-4, "bfloat16": 2e-2, "float16": 2e-2}


class Contestant:
    """A process that trains a step when told."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name, self.seconds = name, list[float]()
        environment = os.environ | {"PYTHONPATH": str(HERE.parent), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.ready: dict[str, Any] = {}
        self.peak_bytes = 0

    def start(self) -> str:
        """Waits until it is ready; gives why it is not, or ""."""
        self.ready = self._hear()
        if not self.ready:
            assert self._process.stderr is not None
            return (self._process.stderr.read().strip().splitlines() or ["it ended without a word"])[-1]
        return ""

    def step(self, counts: bool) -> None:
        seconds = self._ask("step")["seconds"]
        if counts:
            self.seconds.append(seconds)

    def end(self) -> None:
        self.peak_bytes = self._ask("end")["peak_bytes"]
        self._process.wait()

    def _ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        return {}


def model_folder(folder: Path, args: argparse.Namespace) -> None:
    """A Hugging Face folder of the shape with random weights, one tensor at a time."""
    from meshgpt import hf
    from meshgpt.hf import safetensor
    from meshgpt.hf.names import stored_tensors

    family, layers, width, heads = SHAPES[args.shape]
    positions = max(2048 if family == "gptj" else 1024, args.length)
    config = {"model_type": family, "n_layer": layers, "n_head": heads, "n_embd": width, "n_positions": positions}
    config |= {"vocab_size": args.vocab, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    config |= {"rotary_dim": 64} if family == "gptj" else {}
    name = {"gpt2": "GPT2LMHeadModel", "gptj": "GPTJForCausalLM"}[family]
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [name], "torch_dtype": "float32"}))
    tensors, rng = stored_tensors(hf.read_config(folder)), np.random.default_rng(0)
    shapes = [(tensor.name, tensor.shape) for tensor in tensors]
    with safetensor.Writer(folder / "model.safetensors", shapes, np.dtype(np.float32)) as writer:
        for tensor in tensors:
            is_norm = ".ln_" in tensor.name and tensor.name.endswith("weight")
            noise = rng.standard_normal(tensor.shape, np.float32) * np.float32(0.02)
            writer.add(tensor.name, noise + np.float32(is_norm))


def write_task(folder: Path, args: argparse.Namespace) -> None:
    model_folder(folder, args)
    rows = np.random.default_rng(1).integers(0, args.vocab, (args.rows, args.length + 1))
    np.save(folder / "tokens.npy", rows)
    task = {
        "family": SHAPES[args.shape][0], "rows": args.rows, "length": args.length, "dtype": args.dtype,
        "unroll": args.unroll, "remat": args.remat, "cores": len(os.sched_getaffinity(0)), "learning_rate": 3e-4,
        "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0,
    }  # fmt: skip
    (folder / "spec.json").write_text(json.dumps(task))


def contestants(folder: Path, args: argparse.Namespace) -> list[Contestant]:
    def command(script: str, *words: str, python: str = sys.executable) -> list[str]:
        return [python, str(HERE / "contestants" / script), str(folder), *words]

    wanted = {
        "meshgpt": command("ours.py"),
        "transformers": command("torch_peer.py", "transformers", "eager"),
        "transformers, torch.compile": command("torch_peer.py", "transformers", "compiled"),
    }
    if args.nanogpt:
        wanted["nanoGPT, torch.compile"] = command("torch_peer.py", "nanogpt", "compiled", str(args.nanogpt))
    if args.flax_python:
        wanted["transformers 4, Flax"] = command("flax_peer.py", python=str(args.flax_python))
    chosen = {name: words for name, words in wanted.items() if name not in args.without}
    ready = []
    for name, words in chosen.items():  # one after the other: they would slow each other's compilation
        contestant = Contestant(name, words)
        problem = contestant.start()
        print(f"{name}: {problem or 'ready, first losses ' + str(contestant.ready['losses'])}", flush=True)
        if not problem:
            ready.append(contestant)
        elif name == "meshgpt":
            raise SystemExit("without ours there is nothing to compare")
    return ready


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step is, for MFU."""

    tokens: int
    flops: float
    peak: float | None

    @staticmethod
    def of(folder: Path, args: argparse.Namespace) -> "Work":
        import jax

        from meshgpt import hf, scaling
        from meshgpt.models import parameter_shapes

        config = hf.read_config(folder)
        each = scaling.flops_per_token(parameter_shapes(config), config.vocab_size, args.length)
        tokens = args.rows * args.length
        kind = jax.devices()[0].device_kind
        return Work(tokens, each * tokens, args.peak_tflops * 1e12 if args.peak_tflops else scaling.peak_flops(kind))


def figures(contestant: Contestant, ours: float, work: Work) -> dict[str, Any]:
    quartiles = statistics.quantiles(contestant.seconds, n=4)
    median = statistics.median(contestant.seconds)
    return {
        "name": contestant.name,
        "median_ms": 1e3 * median,
        "quartiles_ms": [1e3 * quartiles[0], 1e3 * quartiles[2]],
        "tokens_per_second": work.tokens / median,
        "mfu": None if work.peak is None else work.flops / median / work.peak,
        "peak_gib": contestant.peak_bytes / 2**30,
        "seconds_to_first_step": contestant.ready["seconds_to_first_step"],
        "times_ours": median / ours,
        "losses": contestant.ready["losses"],
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    for name, default in (("rows", 4), ("length", 256), ("rounds", 15), ("vocab", 50257)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=TOLERANCE, help="default: float32 on CPU, bfloat16 elsewhere")
    parser.add_argument("--unroll", type=int, default=0, help="see meshgpt.layers.Execution")
    parser.add_argument("--remat", default="none", help="see meshgpt.layers.Execution")
    parser.add_argument("--nanogpt", type=Path)
    parser.add_argument("--flax-python", type=Path)
    parser.add_argument("--without", nargs="*", default=[], help="names of contestants to leave out")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for MFU, where it is not known")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def main() -> None:
    args = parse()
    gpu = Path("/dev/nvidiactl").exists()
    args.dtype = args.dtype or ("bfloat16" if gpu else "float32")
    if gpu:
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # all of them are on the device at once
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room)
        write_task(folder, args)
        entered = contestants(folder, args)
        ours = entered[0]
        for other in entered[1:]:
            np.testing.assert_allclose(
                other.ready["losses"],
                ours.ready["losses"],
                rtol=TOLERANCE[args.dtype],
                err_msg=f"losses of {other.name}",
            )
        for turn in range(-1, args.rounds):
            shift = turn % len(entered)
            for contestant in entered[shift:] + entered[:shift]:
                contestant.step(counts=turn >= 0)
        for contestant in entered:
            contestant.end()
        work = Work.of(folder, args)
    rows = [figures(contestant, statistics.median(ours.seconds), work) for contestant in entered]
    print(f"\n{'':<30}{'ms':>9}{'quartiles':>16}{'tokens/s':>11}{'MFU':>7}{'GiB':>7}{'first s':>9}{'ours is':>9}")
    for row in rows:
        low, high = row["quartiles_ms"]
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        print(
            f"{row['name']:<30}{row['median_ms']:9.0f}{f'{low:.0f}-{high:.0f}':>16}{row['tokens_per_second']:11,.0f}"
            f"{mfu:>7}{row['peak_gib']:7.2f}{row['seconds_to_first_step']:9.1f}{row['times_ours']:8.2f}x"
        )
    if args.json:
        shape = {key: str(value) for key, value in vars(args).items()}
        machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "system": platform.platform()}
        args.json.write_text(json.dumps({"shape": shape, "machine": machine, "figures": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
