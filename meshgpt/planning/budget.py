"""`meshgpt plan budget`: what three published scaling laws would do with a budget, side by side."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

from meshgpt import flags
from meshgpt.errors import UserError
from meshgpt.hardware import power
from meshgpt.models import flops as scaling
from meshgpt.planning.scaling_laws import LAWS, Choice, Law, ModelShape, critical_batch, learning_rate, shape_for
from meshgpt.settings import settings
from meshgpt.training.trackers import amount, duration

_GPT2_POSITIONS = 1024


@settings()
class Budget:
    """One budget, in operations, in hours of some hardware, or in tokens, and what is assumed besides."""

    flops: float | None = None
    """Budget in floating-point operations, counted as 6 N D."""
    hours: float | None = None
    """Budget in hours of --hardware, the whole step of the model counted (its head and attention too)."""
    tokens: float | None = None
    """Budget in tokens to train on, as many as there are."""
    hardware: str = ""
    """Number and kind of device, such as 8xA100."""
    utilisation: float = 0.4
    """Share of the devices' peak that training reaches (MFU); 0.3 to 0.55 is usual, far less for small models."""
    price: float | None = None
    """Dollars for an hour of one device; None takes a round figure of 2025, which is a guess."""
    family: Literal["gpt2", "gptj"] = "gpt2"
    """Family of the model that is sized."""
    vocab_size: int = 50257
    """Number of token ids of the model that is sized."""
    seq_len: int = 1024
    """Number of tokens in a sequence."""

    def __post_init__(self) -> None:
        given = [name for name in ("flops", "hours", "tokens") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError("give one budget: --flops 1e20, or --hours 8 --hardware 8xA100, or --tokens 3e9")
        value = getattr(self, given[0])
        if not 0 < value < math.inf:
            raise UserError(f"--{given[0]} {value}: give a number above 0")
        if self.hours is not None and not self.hardware:
            raise UserError(f"--hours {self.hours}: of what? give --hardware too, as 8xA100")
        if not 0 < self.utilisation <= 1:
            raise UserError(f"--utilisation {self.utilisation}: give a share above 0 and up to 1")
        if self.price is not None and not 0 <= self.price < math.inf:
            raise UserError(f"--price {self.price}: give dollars for a device and hour")
        if self.vocab_size < 1 or self.seq_len < 1:
            raise UserError(f"--vocab-size {self.vocab_size}, --seq-len {self.seq_len}: give at least 1")

    def rate(self) -> float | None:
        """FLOP/s that training reaches on the hardware; None without hardware."""
        if not self.hardware:
            return None
        number, device = power.parse(self.hardware)
        peak = scaling.peak_flops(device.kind)
        if peak is None:
            raise UserError(f"the peak of {device.name} is not known: give the budget with --flops instead")
        return number * peak * self.utilisation

    def dollars_an_hour(self) -> tuple[float | None, str]:
        """Of all devices together, and what that rests on."""
        if not self.hardware:
            return None, ""
        number, device = power.parse(self.hardware)
        price = device.dollars if self.price is None else self.price
        basis = "a guess: give --price" if self.price is None else "as given"
        return (None, "") if price is None else (number * price, f"${price:g} for a device and hour, {basis}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What one law would do, as a model that can be built. flops: of its steps. hours: None without hardware."""

    choice: Choice
    shape: ModelShape
    batch: float
    peak_lr: float | None
    flops: float
    hours: float | None


def rows(budget: Budget) -> list[Row]:
    """One row for each law."""
    return [_row(law, budget) for law in LAWS]


def _row(law: Law, budget: Budget) -> Row:
    if budget.flops is not None:
        return _build(law.of_flops(budget.flops), budget)
    if budget.tokens is not None:
        return _build(law.of_tokens(budget.tokens), budget)
    assert budget.hours is not None
    hours = budget.hours
    flops = _solve(lambda flops: (_build(law.of_flops(flops), budget).hours or 0.0) - hours)
    return _build(law.of_flops(flops), budget)


def _build(choice: Choice, budget: Budget) -> Row:
    positions = max(_GPT2_POSITIONS, budget.seq_len) if budget.family == "gpt2" else 0
    shape = shape_for(choice.parameters, choice.counting, budget.vocab_size, positions)
    flops, rate = shape.flops_per_token(budget.seq_len) * choice.tokens, budget.rate()
    return Row(
        choice=choice,
        shape=shape,
        batch=critical_batch(choice.loss),
        peak_lr=learning_rate(shape.blocks),
        flops=flops,
        hours=None if rate is None else flops / rate / 3600,
    )


def _solve(excess: Callable[[float], float]) -> float:
    """Where a growing function of operations is nearest to 0, by bisection; sizes of models make it jump a little."""
    low, high = math.log(1e10), math.log(1e32)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if excess(math.exp(middle)) > 0 else (middle, high)
    return math.exp(low)


def describe(budget: Budget) -> str:
    """The table, the spread between the laws, and what the numbers mean."""
    found = rows(budget)
    dollars, basis = budget.dollars_an_hour()
    columns = [["", *(row.choice.law for row in found)]]
    lines: list[tuple[str, Callable[[Row], str]]] = [
        ("parameters", lambda row: f"{amount(row.choice.parameters)} {_counted(row)}"),
        ("as a model", lambda row: f"{row.shape.n_layers} layers, {row.shape.d_model} wide, {row.shape.n_heads} heads"),
        ("all its parameters", lambda row: amount(row.shape.parameters)),
        ("tokens", lambda row: amount(row.choice.tokens)),
        ("tokens a parameter", lambda row: f"{row.choice.tokens / row.shape.parameters:.3g}"),
        ("batch (tokens)", lambda row: amount(row.batch)),
        ("steps", lambda row: f"{math.ceil(row.choice.tokens / row.batch):,}"),
        ("peak learning rate", lambda row: "no rule" if row.peak_lr is None else f"{row.peak_lr:.2g}"),
        ("loss (nats)", lambda row: f"{row.choice.loss:.3f}"),
        ("perplexity", lambda row: f"{row.choice.perplexity:.2f}"),
        ("6 N D", lambda row: f"{row.choice.flops:.3g}"),
        ("its steps take", lambda row: f"{row.flops:.3g} FLOs"),
    ]
    if found[0].hours is not None:
        lines.append(("hours", lambda row: f"{row.hours:.3g} ({duration((row.hours or 0) * 3600)})"))
    if dollars is not None:
        lines.append(("cost", lambda row: f"${dollars * (row.hours or 0):,.2f}"))
    columns += [[name, *(text(row) for row in found)] for name, text in lines]
    return "\n".join([*_aligned(columns), "", *_spread(found), "", *_explained(budget, basis)])


def _counted(row: Row) -> str:
    return "outside embeddings" if row.choice.counting == "non-embedding" else "in all"


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]


def _spread(found: list[Row]) -> list[str]:
    def between(what: str, values: list[float], form: Callable[[float], str]) -> str:
        return f"  {what} {form(min(values))} to {form(max(values))}, a factor of {max(values) / min(values):.2f}"

    return [
        "the laws differ:",
        between("parameters", [row.shape.parameters for row in found], amount),
        between("tokens", [row.choice.tokens for row in found], amount),
        between("perplexity", [row.choice.perplexity for row in found], "{:.1f}".format),
    ]


def _explained(budget: Budget, basis: str) -> list[str]:
    lines = [
        "Losses are on each law's own text and tokenizer (WebText2 for Kaplan, MassiveText for the others), so compare",
        "sizes and tokens across the columns, and losses only down one. Batch (the critical one at that loss) and",
        "learning rate are Kaplan's rules in every column: the other two give none. Sweep the learning rate.",
    ]
    if budget.hardware:
        lines.append(f"{budget.hardware} at {budget.utilisation:.0%} of their peak" + (f"; {basis}." if basis else "."))
    return lines


def command(arguments: Sequence[str]) -> None:
    """meshgpt plan budget --flops|--hours|--tokens ..."""
    print(describe(flags.parse(Budget, arguments, "meshgpt plan budget")))
