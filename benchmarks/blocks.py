"""A benchmark's figures as Markdown, for page.py: one function for each benchmark, from its figures and its arguments.

A function raises KeyError, TypeError, ValueError or AttributeError on figures that the benchmark did not write.
"""

import statistics
from collections.abc import Callable, Iterable
from typing import Any

Figures = dict[str, Any]


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("|  |", "| |")


def number(value: float) -> str:
    """Three digits or more, and thousands apart."""
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def millions(value: float) -> str:
    return f"{value / 1e6:,.1f}"


def gpt2(asked: Figures) -> str:
    return f"GPT-2 of {asked['layers']} layers x {asked['width']}"


def compare(figures: Figures, asked: Figures) -> str:
    del asked  # each comparison has its shape
    return "\n\n".join(_comparison(one["shape"], one["contestants"], one["out"]) for one in figures["comparisons"])


def _comparison(shape: Figures, rows: list[Figures], out: dict[str, str]) -> str:
    family = {"gpt2": "GPT-2", "gptj": "GPT-J"}[shape["family"]]
    ours = "all layers in line" if shape["unroll"] == 0 else f"scanned, {shape['unroll']} at a time"
    lines = [
        f"{family} of {shape['layers']} layers x {shape['width']}, {shape['vocab']:,} tokens of vocabulary, "
        f"{shape['rows']} x {shape['length']:,} tokens a step, {shape['dtype']}; {min(row['steps'] for row in rows)} "
        f"steps of each; ours: {ours}, remat {shape['remat']!r}"
        + ("; PyTorch with gradient checkpointing:" if shape["checkpointing"] else ":")
    ]
    known = any(row["mfu"] is not None for row in rows)
    heads = ["", "step, median (quartiles)", "tokens/s", "peak memory", "to the first step", "ours is"]
    cells = []
    for row in rows:
        low, high = row["quartiles_ms"]
        is_ours = row["name"] == "meshgpt" or row["times_ours"] is None
        line = [
            row["name"],
            f"{number(row['median_ms'])} ms ({number(low)} to {number(high)})",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['peak_gib']:.2f} GiB",
            f"{row['seconds_to_first_step']:.1f} s",
            "" if is_ours else f"{row['times_ours']:.2f}x",
        ]
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        cells.append([*line[:3], mfu, *line[3:]] if known else line)
    lines.append(table([*heads[:3], "MFU", *heads[3:]] if known else heads, cells))
    if out:
        lines.append("Out: " + "; ".join(f"{name} (`{why}`)" for name, why in out.items()) + ".")
    return "\n\n".join(lines)


def train_step(figures: Figures, asked: Figures) -> str:
    rows = [
        [
            name,
            f"{number(one['median_ms'])} ms ({number(one['quartile_1_ms'])} to {number(one['quartile_3_ms'])})",
            f"{number(one['minimum_ms'])} ms",
            f"{one['tokens_per_second']:,.0f}",
        ]
        for name, one in figures["contestants"].items()
    ]
    heads = ("", "step, median (quartiles)", "minimum", "tokens/s")
    before = (
        f"{gpt2(asked)}, {asked['batch']} x {asked['seq']:,} tokens a step, float32, `--unroll {asked['unroll']}`, "
        f"{asked['rounds']} rounds:"
    )
    after = (
        f"Ours is {figures['ratio']:.2f}x as fast; it compiled in {figures['compile_seconds']:.1f} s. A call of our "
        f"step costs {figures['overhead_ms']:.2f} ms of Python."
    )
    return f"{before}\n\n{table(heads, rows)}\n\n{after}"


def generate(figures: Figures, asked: Figures) -> str:
    rows = []
    for one in figures["batches"]:
        ours, theirs = one["meshgpt"], one["transformers"]
        line = [
            f"{one['batch']}, of {one['prompt_tokens']} + {one['new_tokens']} tokens",
            number(ours["tokens_per_second"]),
            number(theirs["tokens_per_second"]),
            f"{one['ratio']:.2f}",
            f"{theirs['cpu_seconds'] / ours['cpu_seconds']:.2f}",
            f"{ours['seconds']:.2f} s ({ours['seconds_q1']:.2f} to {ours['seconds_q3']:.2f})",
            f"{theirs['seconds']:.2f} s ({theirs['seconds_q1']:.2f} to {theirs['seconds_q3']:.2f})",
            f"{ours['first_token_seconds']:.3f} s",
            f"{theirs['first_token_seconds']:.3f} s",
        ]
        rows.append(line)
    heads = ("prompts", "ours, tokens/s", "transformers, tokens/s", "ratio", "ratio of CPU time")
    heads += ("a call, ours (quartiles)", "theirs", "first token, ours", "theirs")
    return f"{gpt2(asked)}, float32, {asked['rounds']} rounds:\n\n{table(heads, rows)}"


def growth(figures: Figures, asked: Figures) -> str:
    rounds = asked["rounds"]
    rows = [
        [
            what,
            ", ".join(map(str, figures["sizes"][what])),
            ", ".join(number(1e3 * cost["seconds"]) for cost in costs),
            f"{figures['time'][what]:.2f}",
        ]
        for what, costs in figures["costs"].items()
    ]
    base = ", ".join(f"{what} {size}" for what, size in figures["base"].items())
    after = (
        f"Medians of {rounds} steps; the rest as in the base: {base}. Compile time against scanned layers grows with "
        f"the exponent {figures['compiling']:.2f}, temporaries a token against the batch with {figures['memory']:.2f}."
    )
    return f"{table(('what grows', 'sizes', 'ms a step', 'exponent'), rows)}\n\n{after}"


def startup(figures: Figures, asked: Figures) -> str:
    recipe = asked["recipe"].rsplit("/", 1)[-1]
    names = {
        "help": "`meshgpt --help`",
        "cold": f"first step of `{recipe}`, nothing compiled before",
        "warm": f"first step of `{recipe}`, with the compilation cache",
    }
    rows = []
    for key, name in names.items():
        every = figures[key]
        rows.append([name, f"{statistics.median(every):.2f} s", ", ".join(f"{one:.2f}" for one in every)])
    return table(("from nothing to", "median", "each"), rows)


def goodput(figures: Figures, asked: Figures) -> str:
    recipe = asked["recipe"].rsplit("/", 1)[-1]
    before = (
        f"`{recipe}` for {asked['steps']} steps, evaluation every {asked['eval_every']}, "
        f"{asked['eval_batches']} batches each, and a checkpoint every {asked['save_every']}:"
    )
    rows = [[what, f"{share:.1f}%"] for what, share in figures["percent"].items()]
    return f"{before}\n\n{table(('', 'of the wall time'), rows)}"


def data(figures: Figures, asked: Figures) -> str:
    names = {"one source": "meshgpt, one source", "mixture": "meshgpt, a mixture", "nanoGPT": "nanoGPT's `get_batch`"}
    speeds = figures["tokens_per_second"]
    rows = [[name, millions(speeds[key])] for key, name in names.items() if key in speeds]
    before = f"{asked['rows']} rows of {asked['seq_len']:,} tokens, the mixture of {asked['sources']} sources:"
    after = f"A loop of steps of {asked['step_ms']:g} ms waits for data {figures['waiting']:.2%} of its time."
    return f"{before}\n\n{table(('', 'million tokens/s'), rows)}\n\n{after}"


def prepare(figures: Figures, asked: Figures) -> str:
    before = f"The best of {asked['rounds']} rounds, {asked['workers']} workers:"
    rows = [
        [
            row["name"],
            f"{row['seconds']:.2f}",
            f"{row['megabytes_per_second']:.2f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['of_encode_batch']:.0%}",
        ]
        for row in figures["rows"]
    ]
    heads = (f"{figures['megabytes']:.1f} MB", "seconds", "MB/s", "tokens/s", "of `encode_batch`'s MB/s")
    return f"{before}\n\n{table(heads, rows)}"


def convert(figures: Figures, asked: Figures) -> str:
    del asked
    heads = ("task", "before, GiB", "peak, GiB", "seconds", "GB/s")
    parts = []
    for shape, one in figures.items():
        rows = [
            [row["task"], f"{row['before']:.2f}", f"{row['peak']:.2f}", f"{row['seconds']:.1f}", f"{row['rate']:.2f}"]
            for row in one["rows"]
        ]
        failed = f" Failed: {', '.join(one['failed'])}." if one["failed"] else ""
        parts.append(f"{shape}, {one['gigabytes']:.2f} GB in bfloat16:{failed}\n\n{table(heads, rows)}")
    return "\n\n".join(parts)


def checkpoint(figures: Figures, asked: Figures) -> str:
    saved = figures["saved"]
    slowest, blocked = max(one["seconds"] for one in saved), max(one["blocked_seconds"] for one in saved)
    before = (
        f"GPT-J of {asked['layers']} layers x {asked['d_model']}, {figures['on_disk'] / 1e9:.2f} GB on disk, saved by "
        f"{len(saved)} processes in {slowest:.1f} s, for {blocked:.2f} s of which they could not go on. Restoring:"
    )
    rows = [
        [
            str(one["process"]),
            f"{one['share'] / 1e6:,.1f}",
            f"{one['read'] / 1e6:,.1f}",
            f"{one['seconds']:.1f}",
            f"{one['digests_read'] / 1e6:,.1f}",
            f"{one['digests_seconds']:.1f}",
        ]
        for one in figures["restored"]
    ]
    heads = ("process", "needs, MB", "read, MB", "seconds", "for the digests, MB", "seconds")
    return f"{before}\n\n{table(heads, rows)}"


def optimizers(figures: Figures, asked: Figures) -> str:
    rows = []
    for row in figures["rows"]:
        low, high = row["quartiles_ms"]
        line = [
            row["optimizer"],
            f"{number(row['wall_ms'])} ms ({number(low)} to {number(high)})",
            f"{row['wall_ratio']:.2f}",
            f"{row['cpu_ratio']:.2f}",
            f"{row['state_bytes_per_parameter']:.2f}",
        ]
        rows.append(line)
    heads = ("optimizer", "an update, median (quartiles)", "time, x", "CPU time, x", "bytes of state a parameter")
    return f"{figures['parameters']:,} parameters, {asked['rounds']} rounds:\n\n{table(heads, rows)}"


def optimizer_losses(figures: Figures, asked: Figures) -> str:
    first = next(iter(figures.values()))["losses"][-1]
    rows = [
        [name, f"{one['losses'][-1]:.4f}", f"{one['losses'][-1] / first - 1:+.2%}"] for name, one in figures.items()
    ]
    return table((f"after {asked['steps']:,} steps", "validation loss", "against the first"), rows)


def quantized(figures: Figures, asked: Figures) -> str:
    rows = [
        [row["form"], f"{row['nbytes']:,}", f"{row['read']:,.0f}", f"{row['generated']:,.1f}"]
        for row in figures["rows"]
    ]
    heads = ("form", "bytes", "read, tokens/s", "generated, tokens/s")
    return f"{gpt2(asked)}, batch {asked['batch']}:\n\n{table(heads, rows)}"


def distillation(figures: Figures, asked: Figures) -> str:
    names = {"taught": "taught", "alone": "from the text alone"}
    rows = [["teacher", f"{figures['teacher']:.4f}", str(asked["teacher_steps"]), ""]]
    for key, name in names.items():
        losses = figures["students"][key]
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        rows.append([name, f"{statistics.mean(losses):.4f}", str(asked["steps"]), each])
    return table(("", "validation loss", "steps", "each seed"), rows)


def traffic(figures: Figures, asked: Figures) -> str:
    before = (
        f"{gpt2(asked)}, {asked['rows']} x {asked['length']:,} tokens, bfloat16, compiled for one {asked['gpu']}; "
        f"layers in line, remat {asked['remat']!r}; at the memory's {figures['bytes_a_second'] / 1e12:.1f} TB/s:"
    )
    kinds = sorted(figures["kinds"].items(), key=lambda one: -one[1]["gigabytes"])
    rows = [
        [kind, str(it["kernels"]), number(it["gigabytes"]), number(it["gigabytes"] * 1e12 / figures["bytes_a_second"])]
        for kind, it in kinds
    ]
    return f"{before}\n\n{table(('kernels', 'how many', 'GB a step', 'ms'), rows)}"


RENDERERS: dict[str, Callable[[Figures, Figures], str]] = {
    "compare": compare,
    "train_step": train_step,
    "generate": generate,
    "growth": growth,
    "startup": startup,
    "goodput": goodput,
    "traffic": traffic,
    "data": data,
    "prepare": prepare,
    "convert": convert,
    "checkpoint": checkpoint,
    "optimizers": optimizers,
    "optimizer_losses": optimizer_losses,
    "quantized": quantized,
    "distillation": distillation,
}
