"""Rows from the host to their devices, and back.

Legend: A accumulated microbatches, M rows of a microbatch over all devices, T tokens.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from meshgpt.distributed.mesh import spec


def fetch(x: jax.Array) -> np.ndarray:
    """The whole of x on the host, of every process; all of them have to ask for it."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


class Feed:
    """Places one process's rows of a batch on its devices.

    The rows of a global batch are numbered 0 .. A M - 1; row a M + m is row m of microbatch a. Which of them a process
    holds follows from where its devices lie in the mesh, not from its number: an axis may span processes.

    rows: the numbers this process has to bring, in the order `place` takes them.
    """

    def __init__(self, mesh: Mesh, accumulate: int, micro: int) -> None:
        self.accumulate, self.micro = accumulate, micro
        self.sharding = NamedSharding(mesh, spec("_ batch seq"))
        indices = self.sharding.addressable_devices_indices_map((accumulate, micro, 1))
        self._slices = {device: index[1].indices(micro)[:2] for device, index in indices.items() if index is not None}
        self._columns = sorted({m for start, stop in self._slices.values() for m in range(start, stop)})
        self.rows: Sequence[int] = [a * micro + m for a in range(accumulate) for m in self._columns]

    def place(self, rows: np.ndarray) -> jax.Array:
        """(len(self.rows), K) on the host to (A, M, K) on the mesh."""
        local = rows.reshape(self.accumulate, len(self._columns), rows.shape[1])
        position = {m: i for i, m in enumerate(self._columns)}
        parts = [
            jax.device_put(local[:, position[start] : position[start] + stop - start], device)
            for device, (start, stop) in self._slices.items()
        ]
        shape = (self.accumulate, self.micro, rows.shape[1])
        return jax.make_array_from_single_device_arrays(shape, self.sharding, parts)
