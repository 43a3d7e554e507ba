"""Which of several processes is slow.

A step takes as long on every process, for they wait for each other in it. So each tells what it does alone: the time of
a step that it does not spend waiting for its devices, and how long a small fixed computation takes on each of them.
"""

import functools
import json
import socket
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from meshgpt.distributed import processes
from meshgpt.distributed.heartbeat import Heartbeat
from meshgpt.settings import json_text

_MOST_NAMED = 16  # processes whose time gets a column of its own in the metrics
_SLOW = 2.0  # times the median
_SLOW_SHARE = 0.1  # of a step
_SLOW_SECONDS = 0.02  # less is no slowness: process 0 writes the metrics
_REPEATS = 3


class StragglerMonitor:
    """Gathers the figures of all processes at a step that is logged."""

    def __init__(self, heartbeat: Heartbeat, message: Callable[[str], None]) -> None:
        """`message` takes a line for the reader, on process 0."""
        self._heartbeat, self._message = heartbeat, message
        self.several = processes.several() and jax.process_count() > 1
        self._told: tuple[int, ...] = ()

    def metrics(self, step: int) -> dict[str, float]:
        """`process_seconds/N` of each process N, `slowest_process` and `slowest_process_seconds`; {} elsewhere than on
        process 0, and for a single process. To be called by all, with nothing under way on the devices."""
        if not self.several:
            return {}
        mine = self._heartbeat.own_seconds() + _probe()
        gathered = processes.gather_text(f"pace/{step}", json_text([mine, socket.gethostname()]))
        if not gathered:
            return {}
        seconds = {number: json.loads(text)[0] for number, text in sorted(gathered.items())}
        slowest = max(seconds, key=lambda number: seconds[number])
        self._say(slowest, seconds, json.loads(gathered[slowest])[1])
        figures = {f"process_seconds/{n}": value for n, value in seconds.items() if len(seconds) <= _MOST_NAMED}
        return figures | {"slowest_process": slowest, "slowest_process_seconds": seconds[slowest]}

    def _say(self, slowest: int, seconds: dict[int, float], host: str) -> None:
        """A line for each process that is found slow, once."""
        usual = statistics.median_low(seconds.values())
        much = seconds[slowest] - usual > max(_SLOW_SECONDS, _SLOW_SHARE * self._heartbeat.step_seconds)
        if seconds[slowest] > _SLOW * usual and much and slowest not in self._told:
            self._told += (slowest,)
            self._message(
                f"process {slowest} on {host} is slow: {seconds[slowest]:.3g} s of a step are its own, and "
                f"{usual:.3g} s elsewhere; all others wait for it"
            )


@functools.cache
def _work() -> tuple[Callable[[jax.Array], jax.Array], list[jax.Array]]:
    """A small computation, and what it takes, once for each device of this process."""
    size, dtype = (256, jnp.float32) if jax.local_devices()[0].platform == "cpu" else (4096, jnp.bfloat16)

    def products(x: jax.Array) -> jax.Array:
        for _ in range(4):
            x = jnp.tanh(x @ x)
        return x

    # Outside of the mesh that is set: this is no part of the program that the processes share.
    with jax.set_mesh(_no_mesh()):
        inputs = [jax.device_put(jnp.full((size, size), 0.01, dtype), device) for device in jax.local_devices()]
    return jax.jit(products), inputs


def _no_mesh() -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.empty((), dtype=object), ())


def _probe() -> float:
    """Seconds of the small computation on the slowest of this process's devices; the best of a few tries."""
    work, inputs = _work()
    slowest = 0.0
    with jax.set_mesh(_no_mesh()):
        for x in inputs:
            tries = []
            for _ in range(_REPEATS):
                begun = time.monotonic()
                jax.block_until_ready(work(x))
                tries.append(time.monotonic() - begun)
            slowest = max(slowest, min(tries))
    return slowest
