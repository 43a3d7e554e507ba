"""How the cost of a step grows: with layers, width, length and batch, as fitted exponents; and what should stay flat.

    python benchmarks/growth.py [--rounds 7] [--json FILE]

Each row changes one thing of a small GPT-2 and fits time ~ x^exponent over the sizes. Theory: 1 for layers and batch
once the work outweighs the rest, up to 2 for width (less while the head and the vocabulary dominate), 1 to 2 for length
(attention). Compile time of scanned layers, and bytes of temporaries a token when the batch grows, should have an
exponent of 0.
"""

import dataclasses
import statistics
import time

import jax
import numpy as np
import record

from meshgpt import runtime
from meshgpt.config import Data, Run
from meshgpt.distributed.mesh import MeshShape, make_mesh, spec
from meshgpt.models.layers import Execution
from meshgpt.models.model import GPT2Config
from meshgpt.objectives.loss import NextToken
from meshgpt.training.program import Program

BASE = {"layers": 4, "width": 256, "length": 256, "batch": 4}
SIZES = {
    "layers": (2, 4, 8, 16),
    "width": (128, 256, 512, 1024),
    "length": (128, 256, 512, 1024),
    "batch": (2, 4, 8, 16),
}
FLAT = {"compile seconds, layers scanned": "layers", "temporary bytes a token": "batch"}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one shape: seconds of a step (median) and of compiling, bytes of temporaries a token."""

    seconds: float
    compiling: float
    bytes_a_token: float


def measure(sizes: dict[str, int], rounds: int) -> Cost:
    model = GPT2Config(
        vocab_size=8192, n_positions=sizes["length"], n_layers=sizes["layers"], n_heads=4, d_model=sizes["width"]
    )
    run = Run(
        model=model, data=Data(), steps=1000, global_batch=sizes["batch"], execution=Execution(unroll=1),
        objective=NextToken(chunk_tokens=1024),
    )  # fmt: skip
    program = Program(run=run)
    begun = time.perf_counter()
    compiled = program.lower().compile()
    compiling = time.perf_counter() - begun
    state = program.fresh()
    rows = np.random.default_rng(0).integers(0, 8192, (1, sizes["batch"], sizes["length"] + 1)).astype(np.int32)
    tokens = jax.device_put(rows, spec("_ batch seq"))
    weights = jax.device_put(np.ones((1, sizes["batch"], sizes["length"]), np.float32), spec("_ batch seq"))
    seconds = []
    for turn in range(-2, rounds):
        begun = time.perf_counter()
        state, metrics = compiled(state, {}, tokens, weights)
        jax.block_until_ready(metrics)
        if turn >= 0:
            seconds.append(time.perf_counter() - begun)
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return Cost(statistics.median(seconds), compiling, analysis.temp_size_in_bytes / (sizes["batch"] * sizes["length"]))


def exponent(sizes: tuple[int, ...], costs: list[float]) -> float:
    """Of the power law through the points, by least squares on logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    begun = record.begin("growth", args)
    runtime.keep_freed_memory()
    kept: dict[str, list[Cost]] = {}
    with jax.set_mesh(make_mesh(MeshShape(data=1), jax.devices()[:1])):
        for what, sizes in SIZES.items():
            kept[what] = [measure(BASE | {what: size}, args.rounds) for size in sizes]
            times = " ".join(f"{1e3 * cost.seconds:.0f}" for cost in kept[what])
            growth = exponent(sizes, [cost.seconds for cost in kept[what]])
            print(f"{what:<8} {' '.join(map(str, sizes)):<18} ms {times:<22} exponent {growth:.2f}", flush=True)
    compiling = exponent(SIZES["layers"], [cost.compiling for cost in kept["layers"]])
    memory = exponent(SIZES["batch"], [cost.bytes_a_token for cost in kept["batch"]])
    for name, growth in zip(FLAT, (compiling, memory), strict=True):
        print(f"{name} against {FLAT[name]}: exponent {growth:.2f}")
    costs = {what: [dataclasses.asdict(cost) for cost in row] for what, row in kept.items()}
    time_of = {what: exponent(SIZES[what], [cost.seconds for cost in row]) for what, row in kept.items()}
    figures = {"base": BASE, "sizes": SIZES, "costs": costs, "time": time_of}
    begun.write(figures | {"compiling": compiling, "memory": memory}, {})


if __name__ == "__main__":
    main()
