"""What an optimizer's update costs: time beside float32 AdamW's, interleaved, and bytes of state a parameter.

    python benchmarks/optimizers.py                                   # GPT-2's shapes, 6 x 512, the machine's devices
    python benchmarks/optimizers.py --layers 12 --width 768 --rounds 15 --json optimizers.json

An update is all between gradients and new parameters: the global norm, clipping, the direction, weight decay, and the
parameters themselves, jitted and donated as in the step. The optimizers take turns, one update each; printed are the
median wall time with quartiles, the CPU time of the process, and both as ratios to AdamW's in float32.
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import record

from meshgpt import trees
from meshgpt.distributed.mesh import MeshShape, make_mesh
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.model import Model
from meshgpt.optim.config import Adafactor, AdamW, AdamW4bit, AdamW8bit, Lion, Muon, Optimizer
from meshgpt.training.step import global_norm
from meshgpt.trees import Tree

OPTIMIZERS: dict[str, Optimizer] = {
    "AdamW, float32": AdamW(),
    "AdamW, bfloat16": AdamW(moment_dtype="bfloat16", second_moment_dtype="bfloat16"),
    "AdamW8bit": AdamW8bit(),
    "AdamW4bit": AdamW4bit(),
    "Adafactor": Adafactor(),
    "Lion": Lion(),
    "Muon": Muon(),
}


def updater(optim: Optimizer, params: Tree) -> tuple[Callable[[], None], int]:
    """A call that makes one update of its own copy of `params`, and the bytes of its state."""
    transformation = optim.transformation()

    def update(params: Tree, state: Tree, gradients: Tree) -> tuple[Tree, Tree]:
        norm = global_norm(gradients)
        finite, factor = jnp.isfinite(norm), jnp.minimum(1.0, optim.clip_norm / norm)
        gradients = jax.tree.map(lambda g: g * factor, gradients)
        updates, state = transformation.update(gradients, state, params, finite=finite)
        new = jax.tree.map(lambda p, u: jnp.where(finite, p - optim.peak_lr * u, p), params, updates)
        return new, state

    program = jax.jit(update, donate_argnums=(0, 1))
    held = [jax.tree.map(jnp.copy, params), jax.jit(transformation.init)(params)]

    def once() -> None:
        held[:] = program(*held, params)
        jax.block_until_ready(held)

    once()
    return once, trees.nbytes(held[1])


def measure(updates: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of wall and CPU time of each update of each round."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in updates}
    for _ in range(rounds):
        for name, once in updates.items():
            wall, cpu = time.perf_counter(), time.process_time()
            once()
            seconds[name]["wall"].append(time.perf_counter() - wall)
            seconds[name]["cpu"].append(time.process_time() - cpu)
    return seconds


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=11)
    asked = parser.parse_args()
    begun = record.begin("optimizers", asked)
    config = GPT2Config(
        vocab_size=asked.vocab, n_positions=1024, n_layers=asked.layers, n_heads=asked.width // 64, d_model=asked.width
    )
    with jax.set_mesh(make_mesh(MeshShape())), jax.numpy_dtype_promotion("standard"):
        params = jax.jit(Model(config=config).init)(jax.random.key(0))
        made = {name: updater(optim, params) for name, optim in OPTIMIZERS.items()}
        seconds = measure({name: once for name, (once, _) in made.items()}, asked.rounds)
    count = trees.count(params)
    print(f"{count:,} parameters on {jax.device_count()} x {jax.devices()[0].device_kind}, {asked.rounds} rounds")
    base = next(iter(seconds.values()))
    rows = []
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times["wall"], n=4)
        cpu = statistics.median(times["cpu"])
        row = {"optimizer": name, "wall_ms": middle * 1e3, "quartiles_ms": [low * 1e3, high * 1e3], "cpu_ms": cpu * 1e3}
        row["wall_ratio"] = middle / statistics.median(base["wall"])
        row["cpu_ratio"] = cpu / statistics.median(base["cpu"])
        row["state_bytes_per_parameter"] = made[name][1] / count
        rows.append(row)
        print(
            f"{name:<16} {middle * 1e3:7.1f} ms ({low * 1e3:.1f} - {high * 1e3:.1f}), x {row['wall_ratio']:.2f}; "
            f"CPU x {row['cpu_ratio']:.2f}; state {row['state_bytes_per_parameter']:.2f} bytes a parameter"
        )
    begun.write({"parameters": count, "rows": rows}, {})


if __name__ == "__main__":
    main()
