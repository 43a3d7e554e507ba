"""One training step of GPT-2: ours beside PyTorch's GPT2LMHeadModel of transformers, interleaved in one run.

    python benchmarks/train_step.py                                  # 12 x 384, 4 x 256 tokens, float32, all cores
    python benchmarks/train_step.py --layers 12 --width 768 --heads 12 --rounds 5 --json step.json

Both start from the same weights, see the same tokens and do the same work: forward, loss, backward, clipping by global
norm, AdamW with decay of matrices only, gradients cleared. They have to agree on the losses of the first steps before
anything is timed. Then they take turns, one step each; medians, quartiles and the ratio of medians are printed.
Last comes what a call of our step costs in Python, at the same depth: the time to dispatch it, not to
run it, for a model too small to keep the device busy.
"""

import argparse
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
from meshgpt.distributed.mesh import MeshShape, make_mesh, spec
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.layers import Execution
from meshgpt.models.model import Model
from meshgpt.objectives.loss import NextToken, next_token_loss
from meshgpt.optim.config import AdamW, Constant
from meshgpt.training.step import from_params, make_train_step
from meshgpt.trees import Tree, leaves_with_names

OPTIM = AdamW(peak_lr=3e-4, warmup_steps=0, schedule=Constant())
OVERHEAD_CALLS = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ours:
    """Our step, compiled: state and one batch on the device, and the call that advances it."""

    initial: dict[str, np.ndarray]
    compile_seconds: float
    step: Callable[[], float]
    dispatch: Callable[[], None]


def build_ours(config: GPT2Config, execution: Execution, objective: NextToken, rows: np.ndarray) -> Ours:
    model = Model(config=config, execution=execution)
    state = jax.jit(lambda key: from_params(model.init(key), OPTIM))(jax.random.key(0))
    initial = _by_hugging_face_name(config, state.params)
    tokens = jax.device_put(rows[None].astype(np.int32), spec("_ batch _"))
    weights = jax.device_put(np.ones((1, rows.shape[0], rows.shape[1] - 1), np.float32), spec("_ batch _"))
    step = jax.jit(make_train_step(next_token_loss(model, objective), OPTIM, 1 << 30, None), donate_argnums=0)
    start = time.perf_counter()
    step.lower(state, tokens, weights).compile()
    compile_seconds = time.perf_counter() - start

    def dispatch() -> None:
        nonlocal state, metrics
        state, metrics = step(state, tokens, weights)

    def one() -> float:
        dispatch()
        jax.block_until_ready(state)
        return float(metrics["loss"])

    metrics: dict[str, jax.Array] = {}
    return Ours(initial=initial, compile_seconds=compile_seconds, step=one, dispatch=dispatch)


def _by_hugging_face_name(config: GPT2Config, params: Tree) -> dict[str, np.ndarray]:
    ours = {name: np.asarray(leaf) for name, leaf in leaves_with_names(params)}
    return {
        tensor.name: to_stored(
            tensor, [ours[path] if tensor.layer is None else ours[path][tensor.layer] for path in tensor.paths]
        )
        for tensor in stored_tensors(config)
    }


def build_torch(config: GPT2Config, initial: dict[str, np.ndarray], rows: np.ndarray) -> Callable[[], float]:
    made = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.n_positions,
        n_embd=config.d_model,
        n_layer=config.n_layers,
        n_head=config.n_heads,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    model = transformers.GPT2LMHeadModel(made)
    model.load_state_dict({name: torch.tensor(value) for name, value in initial.items()}, strict=False)
    model.tie_weights()
    model.train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": OPTIM.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=OPTIM.peak_lr, betas=(OPTIM.b1, OPTIM.b2), eps=OPTIM.eps)
    tokens = torch.from_numpy(rows).long()
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def one() -> float:
        logits = model(inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.item()

    return one


def interleave(steps: dict[str, Callable[[], float]], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of every step, the contestants taking turns; each round starts with another one."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for index in range(-warmup, rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            start = time.perf_counter()
            steps[name]()
            if index >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def dispatch_seconds(layers: int) -> float:
    """Median time until a call of the step returns, for a model of `layers` layers that is 16 wide."""
    config = GPT2Config(vocab_size=64, n_positions=8, n_layers=layers, n_heads=1, d_model=16, vocab_multiple=64)
    ours = build_ours(config, Execution(), NextToken(), np.zeros((1, 9), np.int64))
    times = []
    for _ in range(OVERHEAD_CALLS):
        ours.step()  # nothing is left in flight that the next call could wait for
        start = time.perf_counter()
        ours.dispatch()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def summary(seconds: list[float], tokens: int) -> dict[str, float]:
    quartiles = statistics.quantiles(seconds, n=4)
    median = statistics.median(seconds)
    return {
        "median_ms": 1e3 * median,
        "quartile_1_ms": 1e3 * quartiles[0],
        "quartile_3_ms": 1e3 * quartiles[2],
        "minimum_ms": 1e3 * min(seconds),
        "tokens_per_second": tokens / median,
    }


def parse() -> argparse.Namespace:
    parser = record.parser(__doc__)
    for name, default in (("layers", 12), ("width", 384), ("heads", 6), ("batch", 4), ("seq", 256), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--unroll", type=int, default=Execution().unroll, help="see meshgpt.models.layers.Execution")
    parser.add_argument("--remat", default=Execution().remat, help="see meshgpt.models.layers.Execution")
    parser.add_argument(
        "--chunk", type=int, default=NextToken().chunk_tokens, help="see meshgpt.objectives.loss.NextToken"
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    begun = record.begin("train_step", args)
    if jax.default_backend() != "cpu":
        raise SystemExit(f"this comparison is of CPUs, and JAX runs on {jax.default_backend()}: set JAX_PLATFORMS=cpu")
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    config = GPT2Config(
        vocab_size=args.vocab,
        n_positions=max(1024, args.seq),
        n_layers=args.layers,
        n_heads=args.heads,
        d_model=args.width,
    )
    rows = np.random.default_rng(0).integers(0, args.vocab, (args.batch, args.seq + 1))
    execution, objective = Execution(unroll=args.unroll, remat=args.remat), NextToken(chunk_tokens=args.chunk)
    with jax.set_mesh(make_mesh(MeshShape(data=1), jax.devices()[:1])):
        ours = build_ours(config, execution, objective, rows)
        steps = {"meshgpt": ours.step, "torch": build_torch(config, ours.initial, rows)}
        losses = {name: [step() for _ in range(3)] for name, step in steps.items()}
        print("first losses:", losses)
        np.testing.assert_allclose(losses["meshgpt"], losses["torch"], rtol=1e-4)
        seconds = interleave(steps, args.rounds, warmup=2)
        overhead = dispatch_seconds(args.layers)
    figures = {name: summary(times, args.batch * args.seq) for name, times in seconds.items()}
    for name, figure in figures.items():
        print(f"{name:8}", "  ".join(f"{key} {value:,.1f}" for key, value in figure.items()))
    ratio = figures["torch"]["median_ms"] / figures["meshgpt"]["median_ms"]
    print(f"meshgpt is {ratio:.2f}x as fast as eager PyTorch; compiled in {ours.compile_seconds:.1f} s")
    print(f"a call of the step costs {1e3 * overhead:.3f} ms of Python at {args.layers} layers")
    results = {"contestants": figures, "ratio": ratio, "losses": losses, "overhead_ms": 1e3 * overhead}
    results |= {"compile_seconds": ours.compile_seconds, "seconds": seconds}
    begun.write(results, {"torch": record.versions_of("torch", "transformers")})


if __name__ == "__main__":
    main()
