"""What every benchmark writes with `--json FILE`: its figures, and all that says where they come from.

    parser = record.parser(__doc__)                  # argparse, with --json
    asked = parser.parse_args()
    begun = record.begin("growth", asked)            # before the work: the load of the machine is taken here
    begun.write({"exponent": 1.0}, {"transformers": record.versions_of("torch", "transformers")})

The file: benchmark, command, environment (variables that change what runs), arguments (defaults among them), date
(UTC), commit, changed (files of the program that differ from that commit), machine (cpu, cores allowed, memory_gib,
accelerator), versions (python, jax, jaxlib), peers (who took part, with their versions), load (averages over 1, 5 and
15 minutes as it began), figures. Results that the documentation quotes are in results/; page.py makes tables of them.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_TELLING = ("JAX_", "XLA_", "MALLOC_", "OMP_", "MKL_", "PYTORCH_", "CUDA_")


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, with all that record.py adds")
    return made


def versions_of(*packages: str) -> dict[str, str]:
    """Of packages installed for this Python; one that is not there raises PackageNotFoundError."""
    return {name: importlib.metadata.version(name) for name in packages}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Begun:
    """A benchmark under way."""

    benchmark: str
    asked: argparse.Namespace
    date: str
    load: tuple[float, ...]
    changes: tuple[str | None, list[str]]
    environment: dict[str, str]

    def write(self, figures: dict[str, Any], peers: dict[str, dict[str, str]]) -> None:
        """The file that was asked for, if one was; `peers` by name, with the versions of what they are made of."""
        if self.asked.json is None:
            return
        commit, changed = self.changes
        envelope = {
            "benchmark": self.benchmark,
            "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
            "environment": self.environment,
            "arguments": {name: _plain(value) for name, value in vars(self.asked).items() if name != "json"},
            "date": self.date,
            "commit": commit,
            "changed": changed,
            "machine": machine(),
            "versions": {"python": platform.python_version(), **versions_of("jax", "jaxlib")},
            "peers": peers,
            "load": self.load,
            "figures": figures,
        }
        self.asked.json.parent.mkdir(parents=True, exist_ok=True)
        self.asked.json.write_text(json.dumps(envelope, indent=1) + "\n", encoding="utf-8")


def begin(benchmark: str, asked: argparse.Namespace) -> Begun:
    """`benchmark` names the renderer in page.py; `asked` comes from a parser of `parser` above."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return Begun(
        benchmark=benchmark, asked=asked, date=date, load=os.getloadavg(), changes=_changes(),
        environment=_environment(),
    )  # fmt: skip


def machine() -> dict[str, Any]:
    cpu = _line(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine()
    memory, found = _line(Path("/proc/meminfo"), "MemTotal"), device()
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory.split()[0]) / 2**20, 1) if memory else None,
        "accelerator": None if found["platform"] == "cpu" else f"{found['count']} x {found['kind']}",
    }


@functools.cache
def device() -> dict[str, Any]:
    """platform, kind and count of JAX's devices, from a process of its own: the one that asks keeps a GPU's memory."""
    program = (
        "import json, jax; from meshgpt import runtime; runtime.quiet_libtpu(); d = jax.devices(); "
        "print(json.dumps({'platform': d[0].platform, 'kind': d[0].device_kind, 'count': len(d)}))"
    )
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": str(ROOT)}
    asked = subprocess.run([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(asked.stdout.splitlines()[-1])


def _environment() -> dict[str, str]:
    """Variables that change what runs; folders do not."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(_TELLING) and not k.endswith("_DIR")}


def _line(path: Path, key: str) -> str:
    """The value of the first `key: value` line; "" where there is none."""
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key), "")


def _changes() -> tuple[str | None, list[str]]:
    """The commit of the working tree, and which of the program's files differ from it; (None, []) without git."""

    def git(*words: str) -> str:
        asked = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return asked.stdout.strip() if asked.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--", "meshgpt", "configs", "benchmarks", ":!benchmarks/results")
    return commit or None, [line.split()[-1] for line in changed.splitlines()]


def _plain(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
