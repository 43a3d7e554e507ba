"""The device mesh and the one table that says which tensor axis lies along which mesh axis.

Tensors name their axes in words, `spec("batch seq embed")`, and `Rules` turns the words into a `PartitionSpec`.
All mesh axes are explicit (`jax.sharding.AxisType.Explicit`): a forgotten or contradictory sharding raises when the
program is traced, instead of silently replicating.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, PartitionSpec

from meshgpt.errors import UserError
from meshgpt.settings import settings

AXES = ("data", "fsdp", "tensor")


@settings("mesh")
class MeshShape:
    """Devices along each mesh axis; at most one axis is -1 and takes what the others leave."""

    data: int = -1
    """Number of replicas of the model, each with its own part of the batch; -1 takes all devices that are left."""
    fsdp: int = 1
    """Number of slices that parameters and optimizer state are stored in, gathered at use; the batch is split here too.
    -1 takes all devices that are left."""
    tensor: int = 1
    """Number of devices that share every matmul, split over heads, MLP width and vocabulary; -1 takes all devices that
    are left."""

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        if any(size == 0 or size < -1 for size in sizes):
            raise UserError(f"mesh {self}: every axis is a positive number of devices, or -1 for all that are left")
        if sizes.count(-1) > 1:
            raise UserError(f"mesh {self}: only one axis can be -1")

    def __str__(self) -> str:
        return f"data={self.data} fsdp={self.fsdp} tensor={self.tensor}"

    def resolve(self, device_count: int) -> "MeshShape":
        """The same shape with -1 filled in, for exactly `device_count` devices."""
        sizes = {name: getattr(self, name) for name in AXES}
        known = math.prod(size for size in sizes.values() if size != -1)
        if device_count % known or (-1 not in sizes.values() and known != device_count):
            raise UserError(
                f"mesh {self} needs {'a multiple of ' if -1 in sizes.values() else ''}{known} devices, "
                f"and there are {device_count}. For example: {_suggestion(device_count, self.tensor)}"
            )
        filled = {name: device_count // known if size == -1 else size for name, size in sizes.items()}
        return MeshShape(**filled)

    @property
    def batch_shards(self) -> int:
        """How many slices a batch is cut into (of a resolved shape)."""
        return self.data * self.fsdp


def _suggestion(device_count: int, tensor: int) -> str:
    tensor = math.gcd(device_count, max(tensor, 1))
    return f"--mesh.data {device_count // tensor} --mesh.fsdp 1 --mesh.tensor {tensor}"


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (all of them by default) with the axes `data`, `fsdp`, `tensor`.

    On TPU, neighbours in the mesh are neighbours in the slice; of several slices, each holds whole copies of the model,
    so that only `data` crosses the network between them.
    """
    devices = jax.devices() if devices is None else devices
    shape = shape.resolve(len(devices))
    sizes = (shape.data, shape.fsdp, shape.tensor)
    kinds = (AxisType.Explicit,) * len(AXES)
    if devices[0].platform != "tpu":
        return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape.data % slices:
        raise UserError(f"mesh {shape}: {slices} slices need --mesh.data {slices}, or a multiple of it")
    inside, across = (shape.data // slices, *sizes[1:]), (slices, 1, 1)
    if slices > 1:
        placed = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    else:
        placed = mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=kinds)


def batch_shards() -> int:
    """How many slices a batch is cut into on the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape["data"] * mesh.shape["fsdp"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """Logical axis name to mesh axis (or axes, major first; None is not sharded)."""

    batch: str | tuple[str, ...] | None = ("data", "fsdp")
    seq: str | tuple[str, ...] | None = None
    embed: str | tuple[str, ...] | None = None  # the width of activations
    heads: str | tuple[str, ...] | None = "tensor"
    cells: str | tuple[str, ...] | None = ("data", "fsdp", "tensor")  # rows by heads, each device its own, as one axis
    mlp: str | tuple[str, ...] | None = "tensor"
    vocab: str | tuple[str, ...] | None = "tensor"
    layers: str | tuple[str, ...] | None = None
    fsdp: str | tuple[str, ...] | None = "fsdp"  # the width of parameters at rest
    # Tables of embeddings are sliced by vocabulary only: slicing their width makes XLA rematerialise the lookup.
    # `tensor` is the major axis, so that gathering `fsdp` yields the contiguous slice that `vocab` means.
    vocab_fsdp: str | tuple[str, ...] | None = ("tensor", "fsdp")


RULES = Rules()


def spec(names: str, rules: Rules = RULES) -> PartitionSpec:
    """The PartitionSpec of a tensor whose axes are `names`, separated by spaces; `_` is an axis that is not sharded.

    Raises:
      ValueError: for a name `rules` does not have, or when two axes of the tensor would use the same mesh axis.
    """
    table = {field.name: getattr(rules, field.name) for field in dataclasses.fields(rules)} | {"_": None}
    unknown = [name for name in names.split() if name not in table]
    if unknown:
        raise ValueError(f"unknown axis {unknown[0]!r} in {names!r}; known: {', '.join(table)}")
    entries = [table[name] for name in names.split()]
    used = [axis for entry in entries if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {names!r} use a mesh axis twice: {entries}")
    return PartitionSpec(*entries)


def gathered(names: str) -> str:
    """The axis names of a parameter once its `fsdp` slices are gathered for use."""
    return " ".join({"fsdp": "_", "vocab_fsdp": "vocab"}.get(name, name) for name in names.split())
