"""Greedy generation with a cache: ours beside transformers' `generate`, interleaved in one run.

    python benchmarks/generate.py                                   # GPT-2 124M, float32, batch 1 and 8, all cores
    python benchmarks/generate.py --layers 4 --width 256 --heads 4 --rounds 7 --json generate.json

Both have the same weights and prompts and have to give the same tokens before anything is timed. Then they take turns,
one whole call each: tokens/s is new tokens over the seconds of a call, prefill included. The time to the first token is
a call for one token. Medians, quartiles and the ratio of medians are printed. The processor
seconds of a call are given too. On a machine that others use too, times mean little, and a second thread spins while it
waits for the first: compare processor seconds, on one core (`taskset -c 0 python benchmarks/generate.py`).
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
import record
import torch
import transformers

from meshgpt.convert.hf_names import stored_tensors, to_stored
from meshgpt.distributed.mesh import MeshShape, make_mesh
from meshgpt.inference.generate import Generator
from meshgpt.inference.sampling import Sampling
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.model import Model
from meshgpt.models.precision import Precision
from meshgpt.trees import Tree, leaves_with_names

CORES = len(os.sched_getaffinity(0))  # those that `taskset` leaves
# New tokens of each row, for (prompts, how many).
Contestant = Callable[[list[list[int]], int], list[list[int]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """Seconds of each call: by the clock, and of all processors together."""

    wall: list[float]
    cpu: list[float]

    def summary(self, tokens: int) -> dict[str, float]:
        quartiles = statistics.quantiles(self.wall, n=4)
        median = statistics.median(self.wall)
        return {
            "seconds": median,
            "seconds_q1": quartiles[0],
            "seconds_q3": quartiles[2],
            "cpu_seconds": statistics.median(self.cpu),
            "tokens_per_second": tokens / median,
        }


def ours(model: Model, params: Tree) -> Contestant:
    generator = Generator(model, params)

    def call(prompts: list[list[int]], count: int) -> list[list[int]]:
        found = generator.generate(prompts, Sampling(max_new_tokens=count, temperature=0))
        return [samples[0] for samples in found]

    return call


def theirs(config: GPT2Config, params: Tree) -> Contestant:
    made = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.n_positions,
        n_embd=config.d_model,
        n_layer=config.n_layers,
        n_head=config.n_heads,
        eos_token_id=None,
    )
    model = transformers.GPT2LMHeadModel(made)
    values = {name: np.asarray(leaf) for name, leaf in leaves_with_names(params)}
    state = {}
    for tensor in stored_tensors(config):
        parts = [values[path] if tensor.layer is None else values[path][tensor.layer] for path in tensor.paths]
        state[tensor.name] = torch.from_numpy(np.array(to_stored(tensor, parts)))
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    model.eval()

    def call(prompts: list[list[int]], count: int) -> list[list[int]]:
        rows = torch.tensor(prompts)
        settings = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0, "use_cache": True}
        found = model.generate(rows, attention_mask=torch.ones_like(rows), **settings)  # pyright: ignore[reportAttributeAccessIssue] (its type of self)
        return found[:, rows.shape[1] :].tolist()

    return call


def interleave(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timed]:
    """The contestants take turns; each round starts with another one. Round -1 warms up."""
    timed = {name: Timed(wall=[], cpu=[]) for name in calls}
    names = list(calls)
    for index in range(-1, rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            wall, cpu = time.perf_counter(), time.process_time()
            calls[name]()
            if index >= 0:
                timed[name].cpu.append(time.process_time() - cpu)
                timed[name].wall.append(time.perf_counter() - wall)
    return timed


def compare(contestants: dict[str, Contestant], prompts: list[list[int]], count: int, rounds: int) -> dict:
    """One batch: agreement first, then the first token alone, then the whole."""
    start = time.perf_counter()
    found = {name: call(prompts, count) for name, call in contestants.items()}
    if found["meshgpt"] != found["transformers"]:
        raise SystemExit(f"batch {len(prompts)}: the greedy tokens differ, so the times would mean nothing: {found}")
    warm_seconds = time.perf_counter() - start

    def calls(count: int) -> dict[str, Callable[[], object]]:
        return {name: lambda call=call: call(prompts, count) for name, call in contestants.items()}

    first, whole = interleave(calls(1), rounds), interleave(calls(count), rounds)
    result = {
        "batch": len(prompts),
        "prompt_tokens": len(prompts[0]),
        "new_tokens": count,
        "warm_seconds": warm_seconds,
    }
    for name in contestants:
        result[name] = whole[name].summary(len(prompts) * count) | {
            "first_token_seconds": statistics.median(first[name].wall)
        }
    result["ratio"] = result["meshgpt"]["tokens_per_second"] / result["transformers"]["tokens_per_second"]
    return result


def show(result: dict) -> None:
    print(f"batch {result['batch']}, {result['prompt_tokens']} + {result['new_tokens']} tokens, same greedy tokens")
    for name in ("meshgpt", "transformers"):
        row = result[name]
        print(
            f"  {name:12} {row['tokens_per_second']:8.1f} tokens/s   {row['seconds']:7.3f} s a call "
            f"({row['seconds_q1']:.3f} to {row['seconds_q3']:.3f}, processors {row['cpu_seconds']:.3f})   "
            f"first token {1e3 * row['first_token_seconds']:.0f} ms"
        )
    print(f"  ratio {result['ratio']:.2f}", flush=True)


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    begun = record.begin("generate", asked)

    config = GPT2Config(n_layers=asked.layers, d_model=asked.width, n_heads=asked.heads)
    model = Model(config=config, precision=Precision(compute="float32"))
    torch.set_num_threads(CORES)
    rng = np.random.default_rng(0)
    with jax.set_mesh(make_mesh(MeshShape(data=1), jax.devices()[:1])):
        params = jax.jit(model.init)(jax.random.key(0))
        contestants = {"meshgpt": ours(model, params), "transformers": theirs(config, params)}
        results = []
        for batch in asked.batches:
            prompts = rng.integers(0, config.vocab_size, (batch, asked.prompt_tokens)).tolist()
            results.append(compare(contestants, prompts, asked.new_tokens, asked.rounds))
            show(results[-1])
    begun.write({"batches": results}, {"transformers": record.versions_of("torch", "transformers")})


if __name__ == "__main__":
    main()
