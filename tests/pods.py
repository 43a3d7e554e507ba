"""Pods of processes on this machine, for the tests of what spans several."""

import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from runs import ROOT, Ended, Workshop

from meshgpt.distributed import processes as hosts
from meshgpt.errors import MachineError, UserError


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    workshop: Workshop,
    processes: int,
    devices: int,
    *arguments: object,
    each: dict[int, tuple[str, ...]] | None = None,
    module: str = "meshgpt.train",
) -> list[subprocess.Popen[str]]:
    """`python -m meshgpt.train`, or another module, with `arguments` and those of `each` for a process's number."""
    port = free_port()
    started = []
    for number in range(processes):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": str(workshop.folder / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "MESHGPT_COORDINATOR": f"127.0.0.1:{port}",
            "MESHGPT_PROCESSES": str(processes),
            "MESHGPT_PROCESS_ID": str(number),
        }
        own = (each or {}).get(number, ())
        command = [sys.executable, "-m", module, *map(str, arguments), *own]
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    return started


def ended(processes: list[subprocess.Popen[str]], seconds: float = 240) -> list[Ended]:
    """Waits for all of them, and leaves none behind."""
    try:
        outputs = [process.communicate(timeout=seconds) for process in processes]
        return [Ended(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]
    finally:
        for process in processes:
            process.kill()


class Pod:
    """Processes that are threads of this one, with a key-value store as the coordinator's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
        self.local, self.processes = threading.local(), processes
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()
        monkeypatch.setattr(hosts, "several", lambda: True)
        monkeypatch.setattr(hosts, "_state", lambda: SimpleNamespace(
            client=self, process_id=self.local.number, num_processes=processes
        ))  # fmt: skip
        monkeypatch.setattr(hosts, "turn", lambda: next(self.local.turns))
        monkeypatch.setattr(hosts.time, "sleep", lambda seconds: None)

    def key_value_set(self, key: str, value: str) -> None:
        with self.changed:
            assert key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.values, timeout=60), key
            return self.values[key]

    def key_value_delete(self, key: str) -> None:
        with self.changed:
            del self.values[key]

    def run(self, work: Callable[[int], object]) -> list[object]:
        """What `work(number)` gives or raises on each process."""
        results: list[queue.Queue[object]] = [queue.Queue() for _ in range(self.processes)]

        def one(number: int) -> None:
            self.local.number, self.local.turns = number, iter(range(100))
            try:
                results[number].put(work(number))
            except (UserError, MachineError, OSError) as error:
                results[number].put(str(error))

        for number in range(self.processes):
            threading.Thread(target=one, args=(number,), daemon=True).start()
        return [result.get(timeout=60) for result in results]
