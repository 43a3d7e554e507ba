"""What a run's train step takes of a device's memory, by the compiler's own account."""

import dataclasses
import math
import os
from typing import Any

import jax

from meshgpt.errors import UserError
from meshgpt.training.program import Program
from meshgpt.training.step import summed
from meshgpt.trees import Tree

MARGIN = 0.05  # of a device's memory: what allocators lose, and below which XLA begins to recompute in silence
_GIB = 1 << 30
_REMEDY = "`meshgpt plan memory RECIPE` with the same flags compiles what would make it fit, and ranks it"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes on one device.

    parameters: what is trained. frozen: what is only read. gradients: as many as what is trained (several may share
    their place in time), in float32 where they are summed over microbatches. optimizer: its state, where it rests on
    the device. arguments: all of these but the gradients, and the batch. peak: the most at any time. limit: what the
    device has, or None where that is not known.
    """

    parameters: int
    frozen: int
    gradients: int
    optimizer: int
    arguments: int
    peak: int
    limit: int | None

    @property
    def activations(self) -> int:
        """Activations, the loss's logits, and what else is there at the peak."""
        return max(0, self.peak - self.parameters - self.frozen - self.gradients - self.optimizer)

    @property
    def fits(self) -> bool:
        return self.limit is None or self.peak <= (1 - MARGIN) * self.limit

    def table(self) -> str:
        """For a reader, in GiB."""
        rows = {
            "parameters": self.parameters,
            "frozen parameters": self.frozen,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations and the rest": self.activations,
            "peak": self.peak,
        }
        lines = [
            f"  {name:<24} {size / _GIB:8.2f}" for name, size in rows.items() if size or name != "frozen parameters"
        ]
        if self.limit is not None:
            lines += [f"  {'limit':<24} {self.limit / _GIB:8.2f}"]
            lines += [f"  {'margin':<24} {1 - self.peak / self.limit:8.1%}"]
        return "\n".join(lines)


def measure(program: Program, compiled: jax.stages.Compiled, limit: int | None) -> Footprint:
    """The account of `program`'s train step, compiled for the mesh that is set."""
    analysis = compiled.memory_analysis()
    assert analysis is not None, "this backend gives no account of its memory"
    state = program.abstract()
    trained = shard_bytes(state.params)
    return Footprint(
        parameters=trained,
        frozen=shard_bytes(program.abstract_frozen()),
        gradients=trained if program.run.accumulate == 1 else shard_bytes(summed(state.params)),
        optimizer=shard_bytes(state.opt_state, on_device=True),
        arguments=analysis.argument_size_in_bytes,
        peak=_peak(analysis),
        limit=limit,
    )


def _peak(analysis: Any) -> int:
    """Bytes of the device at the peak.

    On TPU the compiler's figure, which counts the host's memory in. Elsewhere what a program has is allocated in one
    piece as it begins.
    """
    if jax.sharding.get_mesh().devices.flat[0].platform == "tpu":
        on_host = analysis.host_argument_size_in_bytes + analysis.host_temp_size_in_bytes
        return analysis.peak_memory_in_bytes - on_host
    allocated = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    return allocated + max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)


def shard_bytes(tree: Tree, on_device: bool = False) -> int:
    """Bytes of a tree of arrays (or shapes) on one device; `on_device`: without what rests in the host's memory."""

    def size(leaf: jax.ShapeDtypeStruct) -> int:
        if leaf.sharding is None:
            return math.prod(leaf.shape) * leaf.dtype.itemsize
        if on_device and leaf.sharding.memory_kind == "pinned_host":
            return 0
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def device_limit(device: jax.Device) -> int | None:
    """Bytes that programs may use on a device of this process; of a CPU, its share of the machine's memory."""
    if device.platform == "cpu":
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return machine // jax.local_device_count()
    stats = device.memory_stats()
    return None if stats is None else stats.get("bytes_limit")


class NoRoomError(Exception):
    """The compiler gave up for want of memory; its words."""


def compile_lowered(lowered: jax.stages.Lowered, options: dict[str, str | bool] | None = None) -> jax.stages.Compiled:
    """Compiles.

    Raises:
      NoRoomError: the compiler itself found no room (a TPU's does; others compile what does not fit).
    """
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise NoRoomError(str(error)) from error


def compile_fitting(program: Program, step: Any, *arguments: Tree) -> jax.stages.Compiled:
    """`step`, the jitted train step, compiled for these arguments, once it is known that the devices have the room.

    Raises:
      UserError: they have not, with the account where the compiler gives one.
    """
    try:
        compiled = compile_lowered(step.lower(*arguments))
    except NoRoomError as error:
        told = str(error).strip().splitlines()[0][:300]
        raise UserError(f"this run does not fit a device's memory: {told}\n{_REMEDY}") from error
    check_fits(program, compiled)
    return compiled


def check_fits(program: Program, compiled: jax.stages.Compiled) -> None:
    """Looks before the first step whether the devices of this process have the room.

    Raises:
      UserError: they have not, with the account.
    """
    limit = device_limit(jax.local_devices()[0])
    if limit is None:
        return
    found = measure(program, compiled, limit)
    if found.peak > limit:
        raise UserError(
            f"this run does not fit a device's memory ({(found.peak - limit) / _GIB:.2f} GiB too much). "
            f"GiB, by the compiler's account:\n{found.table()}\n"
            f"{_REMEDY}"
        )
