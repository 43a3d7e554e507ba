"""`meshgpt plan memory RECIPE`: what a run takes of a device's memory, and what would bring it under a limit.

Nothing here is a formula: the recipe's own train step is compiled, for this machine's devices or for others', and the
compiler says what it needs. So is every change that is offered.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax

from meshgpt import recipe, runtime
from meshgpt.config import Run
from meshgpt.distributed.mesh import make_mesh
from meshgpt.errors import UserError
from meshgpt.hardware import topologies
from meshgpt.models.model import check_divisibility
from meshgpt.optim.config import AdamW, AdamW4bit, AdamW8bit, Common
from meshgpt.planning import aot
from meshgpt.settings import json_text, settings
from meshgpt.training.memory import Footprint, NoRoomError, compile_lowered, device_limit, measure
from meshgpt.training.program import Program

_GIB = 1 << 30


@settings()
class Arguments:
    """Compiles a recipe's training step and prints what it takes of a device's memory.

    Where that is too much, it says what would change it, each change compiled too. `meshgpt plan memory RECIPE --help`
    lists the flags of the recipe.
    """

    device_memory: str | None = None
    """Memory of a device, as 12GiB or 80GB; None takes what the device has."""
    topology: str | None = None
    """Device to compile for, such as rtx3060, h100x8 or v5e-4 (the names of `meshgpt compile`), which needs the extra
    cuda12, cuda13 or tpu and no such device; None compiles for this machine."""
    tries: int = 8
    """Number of changes that are compiled where it does not fit."""
    json: bool = False
    """Print the figures as JSON, for a program."""


class Change(NamedTuple):
    """One way to take less memory. run: the recipe with it, and with all before it in a combination."""

    how: str
    cost: str
    run: Run


class Tried(NamedTuple):
    """A change, and the bytes a device it led to (None: the compiler gave up without a figure)."""

    change: Change
    peak: float | None
    fits: bool


def command(arguments: Sequence[str]) -> None:
    """meshgpt plan memory RECIPE"""
    asked, rest = recipe.take(Arguments, arguments, "meshgpt plan memory")
    limit = None if asked.device_memory is None else size(asked.device_memory)
    topology = None if asked.topology is None else topologies.parse(asked.topology)
    run = recipe.parse(rest, "meshgpt plan memory")
    say: Callable[[str], None] = (lambda text: None) if asked.json else lambda text: print(text, flush=True)
    target = _here(limit) if topology is None else _elsewhere(topology, limit)
    say(f"compiling {rest[0]} for {target.name}")
    found, peak = _account(run, target)
    if found is not None:
        say(f"on a device (GiB, the compiler's account):\n{found.table()}")
    tried: list[Tried] = []
    if found is None or not found.fits:
        say(_verdict(peak, target.limit))
        tried = list(search(run, target, asked.tries, say))
        say(ranked(tried))
    elif found.limit is not None:
        say(f"it fits: {(found.limit - found.peak) / _GIB:.2f} GiB are left")
    if asked.json:
        print(json_text(_figures(found, peak, target, tried)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Devices to compile for. compile: gives the account of a run, or raises TooLargeError."""

    name: str
    limit: int | None
    compile: Callable[[Run], Footprint]


def _here(limit: int | None) -> Target:
    runtime.start()
    device = jax.devices()[0]
    limit = limit or device_limit(device)

    def compile_here(run: Run) -> Footprint:
        mesh = make_mesh(run.mesh)
        check_divisibility(run.model, run.mesh.resolve(mesh.size), run.global_batch, run.accumulate)
        with jax.set_mesh(mesh):
            program = Program(run=run, document_end=0 if run.data.mask_documents else None)
            try:
                return measure(program, compile_lowered(program.lower()), limit)
            except NoRoomError as error:
                raise aot.TooLargeError(f"it does not fit: {error}") from error

    note = "; a GPU needs less, as its attention is fused: --topology" if device.platform == "cpu" else ""
    return Target(name=f"this machine's {device.device_kind}{note}", limit=limit, compile=compile_here)


def _elsewhere(topology: topologies.Topology, limit: int | None) -> Target:
    aot.quiet_compiler()
    limit = min(limit or topology.memory, topology.memory)
    return Target(name=topology.name, limit=limit, compile=lambda run: aot.compile_for(run, topology, hbm=limit).memory)


def _account(run: Run, target: Target) -> tuple[Footprint | None, float | None]:
    """What a run takes, and its peak; without the former where the compiler gave up."""
    try:
        found = target.compile(run)
    except aot.TooLargeError as error:
        return None, error.needed
    return found, found.peak


def search(run: Run, target: Target, tries: int, say: Callable[[str], None]) -> Iterator[Tried]:
    """Changes that were compiled: each alone, and then, where none is enough, one on top of the other."""
    alone = list(changes(run))[:tries]
    enough, impossible = False, set[str]()
    begun = time.monotonic()
    for number, change in enumerate(alone, start=1):
        one = _try(change, target)
        left = (time.monotonic() - begun) / number * (len(alone) - number)
        said = "tried" if one else "cannot be done here"
        say(f"  {number} of {len(alone)}, {left:.0f} s to go: {said}: {change.how}")
        if one is None:
            impossible.add(change.how)
        else:
            enough = enough or one.fits
            yield one
    kept = next((change for change in alone if change.how not in impossible), None)
    while kept is not None and not enough:
        more = next((one for one in changes(kept.run) if one.how not in {*kept.how.split(", "), *impossible}), None)
        if more is None:
            return
        both = Change(f"{kept.how}, {more.how}", f"{kept.cost}; {more.cost}", more.run)
        one = _try(both, target)
        if one is None:
            impossible.add(more.how)
            continue
        kept, enough = both, one.fits
        say(f"  tried together: {kept.how}")
        yield one


def _try(change: Change, target: Target) -> Tried | None:
    """None for what these devices or this mesh cannot do."""
    try:
        found, peak = _account(change.run, target)
    except UserError:
        return None
    return Tried(change, peak, found is not None and found.fits)


def changes(run: Run) -> Iterator[Change]:
    """What would take less memory than `run` does, the cheapest first; what it has already is left out."""
    execution, optim = run.execution, run.optim
    rows = run.global_batch // run.accumulate
    for parts in (4, 1):  # a quarter of a microbatch, a single row
        smaller = max(rows // 4, 1) if parts == 4 else 1
        if smaller < rows and run.global_batch % smaller == 0 and (parts == 4 or rows // 4 > 1):
            accumulate = run.global_batch // smaller
            yield Change(
                f"--accumulate {accumulate}", "smaller matmuls", dataclasses.replace(run, accumulate=accumulate)
            )
    if execution.remat == "none":
        yield _remat(run, "named", "recomputes norms, biases and GELU")
    yield from _optimizers(run, optim)
    if execution.remat in ("none", "named", "dots"):
        yield _remat(run, "full", "a third more computing")
        yield _remat(run, "offload", "activations travel to the host and back")
    if optim.state_memory == "device" and not isinstance(optim, AdamW4bit):
        paged = dataclasses.replace(optim, state_memory="pinned_host")
        yield Change(
            "--optim.state-memory pinned_host", "the state travels to the device and back every step",
            dataclasses.replace(run, optim=paged),
        )  # fmt: skip


def _remat(run: Run, remat: str, cost: str) -> Change:
    execution = dataclasses.replace(run.execution, remat=remat)
    return Change(f"--execution.remat {remat}", cost, dataclasses.replace(run, execution=execution))


def _optimizers(run: Run, optim: Common) -> Iterator[Change]:
    if isinstance(optim, AdamW | AdamW8bit):
        kinds = (AdamW8bit, AdamW4bit) if isinstance(optim, AdamW) else (AdamW4bit,)
        for kind in kinds:
            shared = {field.name: getattr(optim, field.name) for field in dataclasses.fields(kind)}
            cost = f"moments in {'8' if kind is AdamW8bit else '4'} bits: the losses are in docs/memory.md"
            yield Change(f"optim={kind.__name__}(...)", cost, dataclasses.replace(run, optim=kind(**shared)))


def ranked(tried: Sequence[Tried]) -> str:
    """What was tried, as a table: what fits first, the cheaper before the dearer; then by peak."""
    order = sorted(tried, key=lambda one: (not one.fits, 0.0 if one.fits else one.peak or float("inf")))
    lines = [f"{'peak GiB':>10}  {'':<12} change (cost)"]
    for one in order:
        peak = "?" if one.peak is None else f"{one.peak / _GIB:.2f}"
        fits = "fits" if one.fits else "too large"
        lines.append(f"{peak:>10}  {fits:<12} {one.change.how} ({one.change.cost})")
    if not any(one.fits for one in tried):
        lines.append("none of these is enough: take a smaller model or context, or more devices (--mesh.fsdp)")
    return "\n".join(lines)


def _verdict(peak: float | None, limit: int | None) -> str:
    if peak is None or limit is None:
        return f"it does not fit{'' if limit is None else f' into {limit / _GIB:.2f} GiB'}; trying what would:"
    short = (peak - limit) / _GIB
    by = f"{short:.2f} GiB too much" if short > 0 else "less than 5% would be left, which allocators need"
    return f"it does not fit: {peak / _GIB:.2f} of {limit / _GIB:.2f} GiB, {by}. Trying what would:"


def _figures(found: Footprint | None, peak: float | None, target: Target, tried: Sequence[Tried]) -> dict[str, object]:
    return {
        "target": target.name,
        "limit": target.limit,
        "peak": peak,
        "fits": found is not None and found.fits,
        "memory": None if found is None else dataclasses.asdict(found),
        "changes": [
            {"change": one.change.how, "cost": one.change.cost, "peak": one.peak, "fits": one.fits} for one in tried
        ],
    }


def size(text: str) -> int:
    """Bytes of a text such as 12GiB, 80GB or 500MiB.

    Raises:
      UserError: it is no size.
    """
    stated = re.fullmatch(r"([\d.]+)\s*([KMGT])(i?)B?", text.strip(), re.IGNORECASE)
    try:
        number = float(stated[1]) if stated else 0.0
    except ValueError:
        number = 0.0
    if stated is None or number <= 0:
        raise UserError(f"--device-memory {text}: give a size such as 12GiB or 80GB")
    return int(number * (1024 if stated[3] else 1000) ** ("KMGT".index(stated[2].upper()) + 1))
