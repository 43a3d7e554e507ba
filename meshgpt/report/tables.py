"""Tables of evaluations: a run beside published models, its evaluations by iteration, and several runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from meshgpt.evals.intervals import held_out_text
from meshgpt.report.blocks import Block, Heading, Table, Text
from meshgpt.report.energy import Assumptions, energy
from meshgpt.report.evals import latest
from meshgpt.report.facts import Facts
from meshgpt.report.reference import GPTJ_CARD, REFERENCES, Reference
from meshgpt.report.yardstick import other_text, other_tokens
from meshgpt.training.trackers import amount

_SHORT = {"lambada_openai": "LAMBADA", "hellaswag": "HellaSwag", "winogrande": "Winogrande", "piqa": "PIQA"}
_MOST_ROWS = 40


def references(facts: Facts) -> list[Block]:
    """The run's last results beside published ones; with none yet, only how to get them."""
    ours = {(result.task, result.metric): result for result in latest(facts.results)}
    if not ours:
        text = f"No task was evaluated yet: meshgpt eval {facts.name} --tasks piqa,winogrande,lambada_openai,hellaswag"
        return [Heading(level=3, text="Tasks"), Text(text=text)]
    keys = sorted(ours)
    named = [reference for reference in REFERENCES if reference.figures.keys() & ours.keys()]
    rows = [[one.name, *(_figure(one, key) for key in keys), f"published, {one.source}"] for one in named]
    tries = [result.limited for result in ours.values()]
    source = "a try, on a part of the questions" if all(tries) else "measured here"
    source += "; what is marked is a try" if any(tries) and not all(tries) else ""
    rows.append(
        [
            facts.name,
            *(str(ours[key]) for key in keys),
            f"{source}, step {max(r.step for r in ours.values()):,}",
        ]
    )
    shots = [f"{task}: {ours[task, metric].shots}-shot" for task, metric in keys if ours[task, metric].shots]
    note = (
        "Published figures were not measured here; versions of the harness, shots and normalisation may differ. "
        f"HellaSwag from the {GPTJ_CARD} is taken to be length-normalised."
    )
    header = ["Model", *(_column(*key, ours[key].better_up) for key in keys), "Source"]
    note += f" Of this run: {', '.join(dict.fromkeys(shots))}." if shots else ""
    return [Heading(level=3, text="Tasks"), Table(header=header, rows=rows, strong=(len(rows) - 1,), note=note)]


def _column(task: str, metric: str, better_up: bool | None) -> str:
    arrow = {True: " ↑", False: " ↓", None: ""}[better_up]
    return f"{_SHORT.get(task, task)} {metric}{arrow}"


def _figure(reference: Reference, key: tuple[str, str]) -> str:
    value = reference.figures.get(key)
    return "" if value is None else f"{value:.2f}" + ("" if key[1] == "perplexity" else "%")


def by_iteration(facts: Facts) -> Table | None:
    """Held-out loss and tasks at every step where any was evaluated; of very many, evenly chosen ones. None without."""
    results = {(r.step, r.task, r.metric): r for r in facts.results}
    columns = sorted({(task, metric) for _, task, metric in results})
    named = sorted({key for row in facts.rows for key in row if key.startswith("val/") and key.endswith("/loss")})
    held_out = {row["step"]: row for row in facts.rows if "val_loss" in row or any(key in row for key in named)}
    steps = sorted(held_out.keys() | {step for step, _, _ in results})
    if not steps:
        return None
    rows = []
    keys = ("val_loss", "val_bits_per_byte", *named)
    for step in _chosen(steps):
        row = held_out.get(step, {})
        losses = [_value(row.get(key)) + (held_out_text(row, _prefix(key)) if key in row else "") for key in keys]
        tasks = [str(results[step, *key]) if (step, *key) in results else "" for key in columns]
        rows.append([f"{step:,}", amount(facts.tokens_by(step)), *losses, *tasks])
    header = [
        "Step",
        "Tokens",
        "Validation loss",
        "Bits per byte",
        *named,
        *(f"{_SHORT.get(t, t)} {m}" for t, m in columns),
    ]
    notes = [f"{len(rows)} of {len(steps)} evaluations."] if len(rows) < len(steps) else []
    part = facts.measured_part()
    notes += [] if part is None else [f"Losses and bits per byte are tries: on {part} of the held-out text."]
    return Table(header=header, rows=rows, note=" ".join(notes))


def _prefix(key: str) -> str:
    """What the marks of a loss begin with; bits per byte stand beside one that is marked."""
    return key.removesuffix("loss") if key.endswith("loss") else "-"


def _chosen(steps: Sequence[int]) -> list[int]:
    if len(steps) <= _MOST_ROWS:
        return list(steps)
    last = len(steps) - 1
    return sorted({steps[round(index * last / (_MOST_ROWS - 1))] for index in range(_MOST_ROWS)})


def _value(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) and math.isfinite(value) else ""


def comparison(runs: Sequence[Facts], assumed: Assumptions) -> list[Block]:
    """Several runs beside each other: sizes, work, results, and in what their configurations differ."""
    tasks = [{(result.task, result.metric): result for result in latest(run.results)} for run in runs]
    columns = sorted(set().union(*tasks))
    header = ["Run", "Parameters", "Steps", "Tokens", "FLOs", "Hours", "kWh", "Training loss", "Validation loss"]
    header += ["Bits per byte", *(f"{_SHORT.get(task, task)} {metric}" for task, metric in columns)]
    rows = []
    for run, results in zip(runs, tasks, strict=True):
        kwh = energy(run.device_hours, assumed).kwh
        rows.append([
            run.name,
            amount(run.parameters.total),
            f"{run.step:,}" + ("" if run.finished else f" of {run.run.last_step:,}"),
            amount(run.tokens),
            f"{run.flops:.3g}",
            "" if run.hours is None else f"{run.hours:.4g}",
            "" if kwh is None else f"{kwh:.4g}",
            _value(run.last("loss")),
            _value(run.last("val_loss")) + _try(run),
            _value(run.last("val_bits_per_byte")),
            *(str(results[key]) if key in results else "" for key in columns),
        ])  # fmt: skip
    key, note = compared_by(runs)
    figures = [run.last(key) if key else None for run in runs]
    known = [figure for figure in figures if figure is not None]
    best = [index for index, figure in enumerate(figures) if known and figure == min(known)]
    blocks: list[Block] = [Heading(level=2, text="Runs"), Table(header=header, rows=rows, strong=best, note=note)]
    return blocks + _differences(runs)


def compared_by(runs: Sequence[Facts]) -> tuple[str, str]:
    """(the figure by which the runs can be compared, "" for none; what of them cannot be, in words)."""
    named = [(run.name, run.yardstick) for run in runs]
    if said := other_text(named):
        return "", f"Not comparable: {said}. Neither losses nor bits per byte say which run is better."
    if said := other_tokens(named):
        text = f"Losses and perplexities per token are not comparable: {said}."
        return "val_bits_per_byte", f"{text} Bits per byte are: the run that stands out is the best by these."
    return "val_loss", ""


def _try(run: Facts) -> str:
    """Said behind a run's last held-out loss that is of a part of the text."""
    part = run.measured_part()
    return "" if part is None else held_out_text(run.last_row("val_loss")) or f" (a try: {part})"


def _differences(runs: Sequence[Facts]) -> list[Block]:
    flat = [_flat(run.record["run"]) for run in runs]
    names = dict.fromkeys(name for one in flat for name in one)
    differing = [name for name in names if len({repr(one.get(name)) for one in flat}) > 1 and name != "run_dir"]
    rows = [[name, *("" if one.get(name) is None else str(one[name]) for one in flat)] for name in differing]
    if not rows:
        return []
    table = Table(header=["Field", *(run.name for run in runs)], rows=rows)
    return [Heading(level=2, text="In what they differ"), table]


def _flat(value: object, where: str = "") -> dict[str, object]:
    if isinstance(value, dict):
        nested = [_flat(item, f"{where}.{name}".lstrip(".")) for name, item in value.items()]
        return {name: item for one in nested for name, item in one.items()}
    return {where: value}
