"""Which collectives a compiled program runs, how often, over which mesh axes, and how many bytes they move.

Read from XLA's text of the optimized program (`jax.stages.Compiled.as_text`).
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f16": 2, "bf16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8,
          "s64": 8, "u64": 8}  # fmt: skip
_KINDS = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all|ragged-all-to-all"
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(-start)?\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One instruction.

    times: it runs in a step. size: bytes of its (whole) array on a device. moved: bytes that a device receives each
    time. axes: the mesh axes whose devices take part, joined with "+"; devices: how many those are.
    """

    kind: str
    axes: str
    devices: int
    size: int
    moved: int
    times: int


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """All collectives between devices in a program's text, on a mesh of these axis sizes."""
    computations, entry = _computations(text)
    times = _times(computations, entry)
    found = []
    for name, lines in computations.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match and (group := _group(line, match[2])):
                one = _one(match, group, mesh, scatter="all-reduce-scatter" in name)
                if one.devices > 1:
                    found.append(dataclasses.replace(one, times=times.get(name, 0)))
    return [one for one in found if one.times]


def kernels(text: str) -> list[str]:
    """The targets of the program's custom calls, as "tpu_custom_call" for a Pallas kernel."""
    return re.findall(r'custom_call_target="([^"]+)"', text)


def _one(match: re.Match[str], group: list[int], mesh: Mapping[str, int], scatter: bool) -> Collective:
    kind, count = match[2], len(group)
    sizes = [nbytes(dtype, dims) for dtype, dims in _ARRAY.findall(match[1])]
    # An asynchronous start has operands and results in its type, the larger of which is the whole array.
    size = max(sizes) if match[3] else sum(sizes)
    if kind == "reduce-scatter":
        size *= 1 if match[3] else count
    if kind == "all-reduce" and scatter:  # on TPU: a fusion that keeps a slice of what it reduces
        kind = "reduce-scatter"
    share = (count - 1) / count
    moved = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share) * size
    places = np.stack(np.unravel_index(group, tuple(mesh.values())), 1)
    varying = [axis for axis, column in zip(mesh, places.T, strict=True) if len(set(column.tolist())) > 1]
    return Collective(kind=kind, axes="+".join(varying), devices=count, size=size, moved=int(moved), times=0)


def nbytes(dtype: str, dims: str) -> int:
    """Of an array, its sizes as the program's text has them ("64,1024")."""
    return _BYTES.get(dtype, 0) * math.prod(int(length) for length in dims.split(",") if length)


def _group(line: str, kind: str) -> list[int]:
    """The first group of devices that exchange data."""
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", line.partition("source_target_pairs=")[2].partition("}}")[0] + "}")
        return next(([int(a), int(b)] for a, b in pairs if a != b), [])
    groups = line.partition("replica_groups=")[2]
    if listed := re.match(r"\{\{([\d,]+)\}", groups):
        return [int(number) for number in listed[1].split(",")]
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", groups):
        shape, dims = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if iota[3]:
            ids = ids.transpose([int(n) for n in iota[3].split(",")])
        return ids.reshape(shape)[0].tolist()
    if named := re.match(r"mesh\[(.*?)\] \{(.*?)\}", groups):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        chosen = re.findall(r"'(\w+)'", named[2])
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        return ids[tuple(slice(None) if axis in chosen else 0 for axis in sizes)].ravel().tolist()
    return []


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    found: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            lines = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("  "):
            lines.append(line)
    return found, entry


def _times(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs in one run of the program: the loops around it multiplied."""
    times = dict.fromkeys(computations, 0)
    waiting = [(entry, 1)]
    while waiting:
        name, count = waiting.pop()
        times[name] += count
        waiting += [(callee, count * trips) for callee, trips in _calls(computations[name], computations)]
    return times


def _calls(lines: list[str], computations: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    for line in lines:
        if " while(" in line:
            body, condition = (re.search(rf"{part}=%?([\w.\-]+)", line) for part in ("body", "condition"))
            if body and condition:
                yield body[1], _trips(line, computations[condition[1]], computations)
            continue
        for callee in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", line):
            if callee in computations:
                yield callee, 1


def _trips(line: str, condition: list[str], computations: dict[str, list[str]]) -> int:
    """A loop's turns: stated, or the limit its counter is compared with (every loop of ours counts up from 0)."""
    if stated := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(stated[1])
    inner = [other for part in condition for callee in re.findall(r"calls=%?([\w.\-]+)", part)
             for other in computations.get(callee, [])]  # fmt: skip
    limits = [int(n) for part in [*condition, *inner] for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", part)]
    return max(limits, default=1)
