"""A training step of ours beside every peer that is installed, taking turns in one run.

    python benchmarks/compare.py                                         # 12 x 384, 4 x 256 tokens, float32, on CPU
    python benchmarks/compare.py --suite cpu                             # that and 124M, 4 x 256
    python benchmarks/compare.py --suite gpu --nanogpt PATH --json FILE  # 124M to GPT-J 6B, bfloat16, an hour or two
    python benchmarks/compare.py --shape 124m --rows 64 --length 1024    # one of them
    ... --nanogpt PATH          a checkout of nanoGPT
    ... --flax-python PATH      the Python of an environment with transformers 4, for its Flax models
    ... --list                  the comparisons that the other flags ask for, and nothing more

Peers: transformers' PyTorch model, eager and under torch.compile; nanoGPT's model, eager and compiled, with GPT-2's
biases and, as its authors run it, without; transformers 4's Flax model. Each is a process of its own that starts from
the same weights and sees the same tokens; the work is the same: forward, loss, backward, clipping by global norm, AdamW
with decay of matrices only, parameters in float32. The losses of the first three steps have to agree before anything
counts (of a model without biases the first, and all biases start at zero then). With nanoGPT everybody's vocabulary is
its 50,304. Printed: medians with quartiles, tokens/s, MFU where the device's peak is known, peak memory (of the process
on CPU, of the device on a GPU), seconds from nothing to the first step, and the ratio to ours. On CPU they take turns
by steps, side by side; on a GPU by processes (--passes), each with the device to itself. Who fails is named, and the
rest go on; the exit status is 1 if losses differed or ours was not among those who finished. GPT-J 6B needs 24 GB in
TMPDIR.
"""

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import record
from contest import TOLERANCE, Contest, Entry, Shape, Turns, write_task

OURS = "meshgpt"
# Family, layers, width, heads.
SIZES = {
    "small": ("gpt2", 12, 384, 6),
    "124m": ("gpt2", 12, 768, 12),
    "355m": ("gpt2", 24, 1024, 16),
    "774m": ("gpt2", 36, 1280, 20),
    "1.5b": ("gpt2", 48, 1600, 25),
    "gptj-6b": ("gptj", 28, 4096, 16),
}
# Size, rows, tokens a row, our unroll and remat.
SUITES = {
    "cpu": (("small", 4, 256, 0, "none"), ("124m", 4, 256, 0, "none")),
    "gpu": (
        ("124m", 64, 1024, 0, "none"),
        ("355m", 32, 1024, 0, "none"),
        ("774m", 16, 1024, 0, "none"),
        ("1.5b", 16, 1024, 0, "none"),
        ("gptj-6b", 4, 2048, 1, "dots"),
        ("gptj-6b", 8, 2048, 1, "full"),
    ),
}


def shapes(args: argparse.Namespace) -> list[Shape]:
    wanted = SUITES[args.suite] if args.suite else ((args.shape, args.rows, args.length, 0, "none"),)
    made = []
    for name, rows, length, unroll, remat in wanted:
        family, layers, width, heads = SIZES[name]
        gpt2 = 50304 if args.nanogpt else 50257
        shape = Shape(
            name=name, family=family, layers=args.layers or layers, width=args.width or width,
            heads=args.heads or heads, vocab=args.vocab or (50400 if family == "gptj" else gpt2), rows=rows,
            length=length, dtype=args.dtype, platform=record.device()["platform"],
            unroll=unroll if args.unroll is None else args.unroll,
            remat=args.remat or remat, checkpointing=family == "gptj", plain=bool(args.nanogpt),
        )  # fmt: skip
        made.append(shape)
    return made


def entries(shape: Shape, args: argparse.Namespace) -> list[Entry]:
    def peer(name: str, *words: str, losses: int = 3) -> Entry:
        return Entry(name, "torch_peer.py", words, sys.executable, losses)

    wanted = [
        Entry(OURS, "ours.py", (), sys.executable),
        peer("transformers", "transformers", "eager"),
        peer("transformers, torch.compile", "transformers", "compiled"),
    ]
    if args.nanogpt and shape.family == "gpt2":
        checkout = str(args.nanogpt.resolve())
        wanted += [
            peer("nanoGPT", "nanogpt", "eager", checkout),
            peer("nanoGPT, torch.compile", "nanogpt", "compiled", checkout),
            peer("nanoGPT without biases, torch.compile", "nanogpt-no-bias", "compiled", checkout, losses=1),
        ]
    if args.flax_python:
        wanted.append(Entry("transformers 4, Flax", "flax_peer.py", (), str(args.flax_python)))
    return [entry for entry in wanted if entry.name not in args.without]


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step is, for MFU: tokens, FLOPs, and the device's peak FLOP/s where it is known."""

    tokens: int
    flops: float
    peak: float | None

    @staticmethod
    def of(folder: Path, shape: Shape, peak_tflops: float | None) -> "Work":
        import jax

        from meshgpt import convert
        from meshgpt.models import flops as scaling
        from meshgpt.models.model import parameter_shapes

        jax.config.update("jax_platforms", "cpu")  # or this process would hold memory of the GPU that others need
        config = convert.read_config(folder)
        tokens = shape.rows * shape.length
        flops = tokens * scaling.flops_per_token(parameter_shapes(config), config.vocab_size, shape.length)
        return Work(tokens, flops, peak_tflops * 1e12 if peak_tflops else scaling.peak_flops(record.device()["kind"]))


def figures(contest: Contest, work: Work) -> list[dict[str, Any]]:
    ours = contest.results[OURS].spread()[1] if OURS in contest.results else None
    rows = []
    for name, result in contest.results.items():
        low, median, high = result.spread()
        row = {
            "name": name,
            "median_ms": 1e3 * median,
            "quartiles_ms": [1e3 * low, 1e3 * high],
            "tokens_per_second": work.tokens / median,
            "mfu": None if work.peak is None else work.flops / median / work.peak,
            "peak_gib": result.peak_bytes / 2**30,
            "seconds_to_first_step": result.seconds_to_first_step,
            "times_ours": None if ours is None else median / ours,
            "steps": len(result.seconds),
            "losses": result.losses,
        }
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'':<38}{'ms':>9}{'quartiles':>16}{'tokens/s':>11}{'MFU':>7}{'GiB':>7}{'first s':>9}{'ours is':>9}")
    for row in rows:
        low, high = row["quartiles_ms"]
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        times = "" if row["times_ours"] is None else f"{row['times_ours']:.2f}x"
        print(
            f"{row['name']:<38}{row['median_ms']:9.0f}{f'{low:.0f}-{high:.0f}':>16}{row['tokens_per_second']:11,.0f}"
            f"{mfu:>7}{row['peak_gib']:7.2f}{row['seconds_to_first_step']:9.1f}{times:>9}"
        )
    print(flush=True)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = record.parser(__doc__)
    parser.add_argument("--suite", choices=SUITES, help="these comparisons, with their own rows and lengths")
    parser.add_argument("--shape", choices=SIZES, default="small")
    for name, default in (("rows", 4), ("length", 256), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("layers", "width", "heads", "vocab"):
        parser.add_argument(f"--{name}", type=int, help="instead of the shape's own")
    parser.add_argument("--dtype", choices=TOLERANCE, help="default: float32 on CPU, bfloat16 elsewhere")
    parser.add_argument("--unroll", type=int, help="of ours; see meshgpt.models.layers.Execution")
    parser.add_argument("--remat", help="of ours; see meshgpt.models.layers.Execution")
    parser.add_argument("--nanogpt", type=Path)
    parser.add_argument("--flax-python", type=Path)
    parser.add_argument("--without", nargs="*", default=[], help="names of contestants to leave out")
    parser.add_argument("--passes", type=int, help="processes of each, one at a time; 0: all of them side by side")
    parser.add_argument("--patience", type=float, default=1200, help="seconds until a contestant has to be ready")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for MFU, where it is not known")
    parser.add_argument("--list", action="store_true", help="show what would be compared, and end")
    args = parser.parse_args(words)
    if args.nanogpt and not (args.nanogpt / "model.py").is_file():
        parser.error(f"--nanogpt {args.nanogpt}: no model.py is there; give the folder of a checkout of nanoGPT")
    on_cpu = record.device()["platform"] == "cpu"
    args.dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    args.passes = (0 if on_cpu else 2) if args.passes is None else args.passes
    return args


def main() -> None:
    args = parse()
    begun = record.begin("compare", args)
    comparisons, peers, wrong = list[dict[str, Any]](), dict[str, dict[str, str]](), False
    asked = shapes(args)
    for number, shape in enumerate(asked, 1):
        print(f"{number} of {len(asked)}: {shape}", flush=True)
        entered = entries(shape, args)
        if args.list:
            print("\n".join(f"  {entry.name}" for entry in entered))
            continue
        turns = Turns(rounds=args.rounds, passes=args.passes, patience=args.patience)
        with tempfile.TemporaryDirectory() as room:
            write_task(Path(room), shape)
            contest = Contest(Path(room), entered, turns, shape.dtype)
            contest.run()
            rows = figures(contest, Work.of(Path(room), shape, args.peak_tflops))
        show(rows)
        comparisons.append({"shape": dataclasses.asdict(shape), "contestants": rows, "out": contest.out})
        peers |= {name: result.versions for name, result in contest.results.items() if name != OURS}
        wrong |= OURS not in contest.results or any("losses differ" in why for why in contest.out.values())
        begun.write({"comparisons": comparisons}, peers)
    if wrong:
        raise SystemExit("not a comparison: losses differed or ours is missing, see above")


if __name__ == "__main__":
    main()
