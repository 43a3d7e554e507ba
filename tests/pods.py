"""Pods of processes on this machine, for the tests of what spans several."""

import os
import socket
import subprocess
import sys

from runs import ROOT, Ended, Workshop


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
