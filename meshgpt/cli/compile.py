"""`meshgpt compile RECIPE --topology v3-256`: a recipe proved for a pod before it is rented, or made to fit."""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from meshgpt import recipe
from meshgpt.config import Run
from meshgpt.distributed.mesh import MeshShape
from meshgpt.errors import UserError
from meshgpt.hardware import topologies
from meshgpt.hardware.topologies import Topology
from meshgpt.models.model import check_divisibility
from meshgpt.planning import aot
from meshgpt.planning.aot import Proof, TooLargeError
from meshgpt.settings import json_text, settings
from meshgpt.training.memory import MARGIN

_GIB = 1 << 30


@settings()
class Arguments:
    """Compiles a recipe's training step for devices that need not be there: memory, collectives, and time of a step.

    The compiler is in the extra `tpu` (for GPUs: cuda12 or cuda13). `meshgpt compile RECIPE --help` lists the flags of
    the recipe.
    """

    topology: str
    """Devices to compile for: v2-8 to v3-2048, v4-512, v5e-256, v5p-128 or v6e-256 as they are rented, v3:8x16 by
    chips, 2xv5e-256 for two slices, h100x8, a100x4 or rtx3060."""
    fix: bool = False
    """Where it does not fit, or is slow, search mesh, accumulation and remat, and print a ranked table."""
    tries: int = 6
    """Number of candidates that --fix compiles."""
    effort: Literal["low", "full"] = "full"
    """Effort of the compiler: `low` compiles faster (three times with JAX 0.10), with peaks within a few percent."""
    json: bool = False
    """Print the figures as JSON, for a program."""


def compile_recipe(arguments: Sequence[str]) -> None:
    """meshgpt compile RECIPE --topology NAME"""
    asked, rest = recipe.take(Arguments, arguments, "meshgpt compile")
    topology = topologies.parse(asked.topology)
    run = recipe.parse(rest, "meshgpt compile")
    aot.quiet_compiler()
    if asked.effort == "low":
        aot.set_effort(low=True)
    say: Callable[[str], None] = (lambda text: None) if asked.json else print
    if asked.fix:
        results = search(run, topology, asked.tries, say)
        found = [{"flags": flags(one)} | _outcome(outcome) for one, outcome in results]
        print(json_text(found) if asked.json else ranked(results))
        return
    say(f"compiling for {topology.name}, {topology.device_count} devices: a minute or so")
    try:
        proof = aot.prove(run, topology)
    except TooLargeError as error:
        raise TooLargeError(f"{error}. {nearest(run, topology)}") from error
    print(json_text(figures(proof)) if asked.json else describe(proof))
    if not proof.memory.fits:
        raise UserError(f"it fits only just: less than {MARGIN:.0%} is left. {nearest(run, topology)}")


def figures(proof: Proof) -> dict[str, Any]:
    """All of a proof's figures, as JSON."""
    return {
        "topology": proof.topology.name,
        "devices": proof.topology.device_count,
        "mesh": dataclasses.asdict(proof.mesh),
        "memory": dataclasses.asdict(proof.memory),
        "attention": proof.kernel,
        "flops_per_token": proof.flops_per_token,
        "collectives": [dataclasses.asdict(one) for one in proof.collectives],
        "seconds": {"computing": proof.estimate.computing, "moving": proof.estimate.moving,
                    "best": proof.estimate.best, "worst": proof.estimate.worst},
    }  # fmt: skip


def _outcome(outcome: Proof | str) -> dict[str, Any]:
    return {"error": outcome} if isinstance(outcome, str) else figures(outcome)


def describe(proof: Proof) -> str:
    """A proof for a reader."""
    memory, topology, run = proof.memory, proof.topology, proof.run
    how = f"{run.accumulate} microbatches, remat {run.execution.remat}, attention {proof.kernel}"
    lines = [
        f"{topology.name}: {topology.device_count} devices as {proof.mesh}, {how}",
        "memory of a device (GiB, the compiler's account):",
        memory.table(),
        "collectives of a step (by kind and mesh axis; bytes that a device receives):",
        *_traffic(proof),
        f"FLOPs of a token: {proof.flops_per_token:,}",
        *_time(proof),
    ]
    return "\n".join(lines)


def _traffic(proof: Proof) -> list[str]:
    moved, times = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for one in proof.collectives:
        moved[one.kind, one.axes] += one.moved * one.times
        times[one.kind, one.axes] += one.times
    return [
        f"  {kind:<20} {axes:<16} {times[kind, axes]:>7,} times {size / _GIB:10.3f} GiB"
        for (kind, axes), size in moved.most_common()
    ]


def _time(proof: Proof) -> list[str]:
    estimate, tokens = proof.estimate, proof.tokens_per_step
    best, worst = estimate.best, estimate.worst
    moving = ", ".join(f"{axes} {seconds:.2f} s" for axes, seconds in estimate.moving.items() if seconds >= 0.005)
    days = [proof.run.last_step * seconds / 86400 for seconds in (best, worst)]
    assumed = (
        f"{aot.EFFICIENCY:.0%} of {aot.peak(proof.topology) / 1e12:.0f} TFLOP/s where it computes, recomputation too"
    )
    speed = f"{tokens / best:,.0f} to {tokens / worst:,.0f} tokens/s"
    return [
        f"a step (estimate): {best:.2f} s if sending hides behind computing, {worst:.2f} s if nothing does",
        f"  computing {estimate.computing:.2f} s; sending {moving or 'next to nothing'}",
        f"  {speed}, MFU {proof.mfu(best):.0%} to {proof.mfu(worst):.0%}",
        f"  {proof.run.last_step:,} steps of {tokens:,} tokens: {days[0]:.1f} to {days[1]:.1f} days",
        f"  assumed: {assumed}; each axis of the mesh along one axis of the slice (docs/pods.md has the links)",
    ]


def candidates(run: Run, topology: Topology) -> Iterator[Run]:
    """Runs of the same batch and model that the mesh divides: other meshes, accumulations, and remat."""
    devices = topology.device_count
    for tensor in (1, 2, 4, 8, 16):
        for data in sorted({topology.slices, topology.slices * 2, topology.slices * 4, devices // tensor}):
            if not data or devices % (tensor * data):
                continue
            mesh = MeshShape(data=data, fsdp=devices // (tensor * data), tensor=tensor)
            for accumulate in (2**power for power in range(int(math.log2(run.global_batch)) + 1)):
                try:
                    check_divisibility(run.model, mesh, run.global_batch, accumulate)
                except UserError:
                    continue
                for remat in ("none", "named", "full"):
                    execution = dataclasses.replace(run.execution, remat=remat)
                    yield dataclasses.replace(run, mesh=mesh, accumulate=accumulate, execution=execution)


def expected(run: Run, topology: Topology) -> tuple[float, float]:
    """(seconds of a step, bytes of a device), by arithmetic: which candidates are worth compiling."""
    model, mesh = run.model, run.mesh
    weights = 12 * model.n_layers * model.d_model**2 + 2 * model.padded_vocab * model.d_model
    tokens = run.global_batch * run.sequence_length
    again = aot.RECOMPUTED[run.execution.remat]
    operations = 2 * weights * (3 + again) + run.objective.flops_beside(model, run.sequence_length)
    compute = operations * tokens / (topology.device_count * aot.peak(topology) * aot.EFFICIENCY)
    local = tokens / mesh.batch_shards
    between = (4 + 2 * again) * model.n_layers * local * model.d_model * 4 * (mesh.tensor - 1) / mesh.tensor
    gathered = run.accumulate * (2 + again) * 2 * weights / mesh.tensor * (mesh.fsdp > 1)
    seconds = max(compute, (between + gathered) / aot.bandwidth(topology, across=False))
    # Values of a token that a layer keeps, in widths of the model.
    kept = {"none": 34, "named": 16, "offload": 4, "dots": 20, "full": 2}[run.execution.remat]
    rows = local / run.accumulate * model.d_model * 2
    activations = rows * model.n_layers * (2 + (kept - 2) / mesh.tensor) + rows * 40
    state = 16 * weights / (mesh.fsdp * mesh.tensor) + 4 * model.padded_vocab * model.d_model / mesh.tensor
    return seconds, state + activations


def search(run: Run, topology: Topology, tries: int, say: Callable[[str], None]) -> list[tuple[Run, Proof | str]]:
    """The most promising candidates, compiled."""
    rated = [(expected(one, topology), one) for one in candidates(run, topology)]
    fitting = [(seconds, one) for (seconds, size), one in rated if size < topology.memory]
    # Of equal speed the one that recomputes and cuts up least is tried first.
    fitting.sort(key=lambda pair: (round(pair[0], 2), pair[1].accumulate))
    if not fitting:
        smallest = min(size for (_, size), _ in rated) if rated else math.inf
        raise UserError(
            f"nothing fits on {topology.name}: about {smallest / _GIB:.1f} GiB a device at least, of "
            f"{topology.memory / _GIB:.2f}; take more devices, or a lower --global-batch"
        )
    results: list[tuple[Run, Proof | str]] = []
    for number, (_, one) in enumerate(fitting[:tries], start=1):
        started = time.monotonic()
        try:
            outcome: Proof | str = aot.prove(one, topology)
        except TooLargeError as error:
            outcome = str(error)
        results.append((one, outcome))
        say(f"{number} of {min(tries, len(fitting))}: {flags(one)} ({time.monotonic() - started:.0f} s)")
    return results


def flags(run: Run) -> str:
    """The flags that turn the recipe into `run`."""
    mesh = f"--mesh.data {run.mesh.data} --mesh.fsdp {run.mesh.fsdp} --mesh.tensor {run.mesh.tensor}"
    return f"{mesh} --accumulate {run.accumulate} --execution.remat {run.execution.remat}"


def ranked(results: Sequence[tuple[Run, Proof | str]]) -> str:
    """A table of what `search` found, the fastest that fit first."""
    proofs = [(one, proof) for one, proof in results if isinstance(proof, Proof) and proof.memory.fits]
    proofs.sort(key=lambda pair: (pair[1].estimate.best, pair[1].estimate.worst))
    lines = [f"{'step':>15} {'peak GiB':>9}  flags"]
    for one, proof in proofs:
        span = f"{proof.estimate.best:.2f}-{proof.estimate.worst:.2f} s"
        lines.append(f"{span:>15} {proof.memory.peak / _GIB:>9.2f}  {flags(one)}")
    for one, outcome in results:
        if isinstance(outcome, str) or not outcome.memory.fits:
            lines.append(f"{'does not fit':>15} {'':>9}  {flags(one)}")
    return "\n".join(lines)


def nearest(run: Run, topology: Topology) -> str:
    """What to change so that it fits, by arithmetic: as little as possible."""

    def distance(one: Run) -> tuple[int, int, float]:
        same = [one.mesh == run.mesh.resolve(topology.device_count), one.accumulate == run.accumulate,
                one.execution.remat == run.execution.remat]  # fmt: skip
        return same.count(False), abs(one.accumulate - run.accumulate), expected(one, topology)[0]

    _, now = expected(dataclasses.replace(run, mesh=run.mesh.resolve(topology.device_count)), topology)
    room = min(0.8 * topology.memory, 0.9 * now)
    fitting = [one for one in candidates(run, topology) if expected(one, topology)[1] < room]
    if not fitting:
        return "No mesh, accumulation or remat would make it fit: take more devices, or a lower --global-batch"
    return f"The nearest that should fit: {flags(min(fitting, key=distance))}; --fix compiles several and ranks them"
