"""Silent corruption: what several devices hold copies of is compared, bit for bit, by digests.

A digest of 32 bits is the sum of an array's words, each times another odd number: no change of a single word leaves it
the same. It is computed where the copy lies, so that nothing but digests moves.

Legend: P devices of the mesh in order, K leaves.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from meshgpt.distributed.host_memory import KIND as HOST_MEMORY
from meshgpt.errors import MachineError
from meshgpt.trees import Tree, leaves_with_names

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def digests(leaves: Sequence[jax.Array]) -> jax.Array:
    """uint32 (P, K), on every device: of what each device of the mesh holds of each array. Inside jit only."""
    axes = jax.sharding.get_abstract_mesh().axis_names

    def local(*shards: jax.Array) -> jax.Array:
        return jax.lax.all_gather(jnp.stack([_digest(shard) for shard in shards]), axes)

    specs = tuple(jax.typeof(leaf).sharding.spec for leaf in leaves)
    return jax.shard_map(local, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)(*leaves)


def digests_every(every: int, leaves: Sequence[jax.Array], step: jax.Array) -> jax.Array:
    """`digests` where `every` divides `step`, else zeros, which cost nothing."""
    devices = jax.sharding.get_abstract_mesh().size
    zeros = jnp.zeros((devices, len(leaves)), jnp.uint32)
    return jax.lax.cond(step % every == 0, lambda: digests(leaves), lambda: zeros)


def _digest(x: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).reshape(-1).astype(jnp.uint32)
    odd = 2 * jax.lax.iota(jnp.uint32, words.size) + 1
    return jnp.sum(words * odd, dtype=jnp.uint32)


@dataclasses.dataclass(frozen=True)
class _Copies:
    """names of the leaves; same (K, P): the first device that holds the same slice of a leaf as each device."""

    names: tuple[str, ...]
    same_KP: np.ndarray

    @staticmethod
    def of(named: Sequence[tuple[str, jax.Array]], mesh: jax.sharding.Mesh) -> "_Copies":
        rows = []
        for _, leaf in named:
            slices = leaf.sharding.devices_indices_map(leaf.shape)
            first: dict[str, int] = {}
            rows.append([first.setdefault(str(slices[d]), place) for place, d in enumerate(mesh.devices.flat)])
        return _Copies(tuple(name for name, _ in named), np.array(rows))


class ReplicaCheck:
    """Compares the copies of a run's state every `every` steps and before each save; 0 does nothing.

    With several processes each calls every method, and each raises.
    """

    def __init__(self, every: int, mesh: jax.sharding.Mesh, state: Tree) -> None:
        """`state` in arrays, laid out as it stays. What lies in the host's memory is not compared."""
        self.every, self._mesh = every, mesh
        if not every:
            return
        self._state = _Copies.of(_on_devices(state), mesh)
        self._gradients = _Copies.of(leaves_with_names(state["params"]), mesh)
        self._digests = jax.jit(digests)

    def due(self, step: int) -> bool:
        """Whether the state after `step` is to be compared, saved or not."""
        return bool(self.every) and step % self.every == 0

    def compare(self, step: int, state: Tree) -> None:
        """Compares the copies of `state` after `step`.

        Raises:
          MachineError: two copies differ; it names the process and the device.
        """
        if self.every:
            found_PK = np.asarray(self._digests([leaf for _, leaf in _on_devices(state)]))
            _refuse_differing(self._state, found_PK, self._mesh, f"after step {step:,}")

    def compare_gradients(self, step: int, found_PK: np.ndarray | None) -> None:
        """The same for the gradients of `step`, whose digests `digests_every` took, or nobody."""
        if found_PK is not None and step % self.every == 0:
            _refuse_differing(self._gradients, found_PK, self._mesh, f"the gradients of step {step:,}")


def _on_devices(state: Tree) -> list[tuple[str, jax.Array]]:
    return [(name, leaf) for name, leaf in leaves_with_names(state) if leaf.sharding.memory_kind != HOST_MEMORY]


def _refuse_differing(copies: _Copies, found_PK: np.ndarray, mesh: jax.sharding.Mesh, when: str) -> None:
    for name, same_P, found_P in zip(copies.names, copies.same_KP, found_PK.T, strict=True):
        if (found_P == found_P[same_P]).all():
            continue
        for first in sorted(set(same_P.tolist())):
            holders = np.flatnonzero(same_P == first)
            values, counts = np.unique(found_P[holders], return_counts=True)
            if len(values) == 1:
                continue
            wrong = holders[found_P[holders] != values[counts.argmax()]]
            told = counts.max() * 2 > len(holders)  # a majority tells who is wrong
            named = [_described(mesh, place) for place in (wrong if told else holders).tolist()]
            who = f"{'; '.join(named[:3])}{f'; and {len(named) - 3} more' if len(named) > 3 else ''}"
            verb = "holds other bits than" if told else "do not hold the same bits, of"
            raise MachineError(
                f"silent corruption, {when}: {who} {verb} the {len(holders)} copies of {name}. Nothing was saved since "
                "the last check. Go on without that device, or the same command tries again from the checkpoint before"
            )


def _described(mesh: jax.sharding.Mesh, place: int) -> str:
    device = mesh.devices.flat[place]
    where = np.unravel_index(place, mesh.devices.shape)
    axes = " ".join(f"{axis}={index}" for axis, index in zip(mesh.axis_names, where, strict=True))
    return f"process {device.process_index}, device {device.id} ({device.device_kind}, {axes})"
