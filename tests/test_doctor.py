"""`meshgpt doctor`, on this machine and on devices it only pretends to have."""

import subprocess
import sys
from dataclasses import dataclass

import jax
import pytest

from meshgpt.cli import doctor


@dataclass
class Pretended:
    """As much of a `jax.Device` as doctor looks at."""

    device_kind: str
    platform: str = "gpu"
    limit: int = 0

    def memory_stats(self):
        return {"bytes_limit": self.limit, "bytes_in_use": 1 << 29} if self.limit else None


def test_it_describes_this_machine():
    text = doctor.examine()
    assert f"jax {jax.__version__}\n" in text
    assert f"devices: {jax.local_device_count()} (cpu)" in text
    assert "peak not known" in text
    assert "disk free" in text


def test_known_devices_show_memory_and_peak():
    devices = [Pretended("NVIDIA H200", limit=100 << 30)] * 2 + [Pretended("NVIDIA Z9")]
    assert doctor.describe_devices(devices).splitlines() == [
        "devices: 3 (gpu)",
        "  2 x NVIDIA H200: 100.0 GiB for JAX, 0.5 in use, peak 989 TFLOP/s in 16 bits",
        "  1 x NVIDIA Z9: peak not known, so MFU is not shown",
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8, 12, 256])
def test_every_suggested_mesh_uses_every_device(count):
    lines = doctor.suggest_meshes(count).splitlines()[1:]
    for line in lines:
        words = line.split()
        sizes = [int(words[at + 1]) for at, word in enumerate(words) if word.startswith("--mesh.")]
        assert len(sizes) == line.count("--mesh.")
        product = 1
        for size in sizes:
            product *= size
        assert product == count
    assert len(lines) == {1: 0, 3: 2}.get(count, 3)


def test_a_backend_that_cannot_start_is_said(monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr(jax, "local_devices", fail)
    assert "devices: JAX cannot start: Unable to initialize backend 'tpu'" in doctor.examine()


def test_a_device_that_jax_does_not_use_is_named(monkeypatch, tmp_path):
    plugged = tmp_path / "nvidiactl"
    plugged.touch()
    monkeypatch.setattr(doctor, "_PLUGGED_IN", ((str(plugged), "gpu", "an NVIDIA GPU", "pip install X"),))
    assert doctor.examine().endswith("an NVIDIA GPU is here but JAX does not use it: pip install X")


def test_importing_it_does_not_bring_jax():
    code = "import sys, meshgpt.cli.doctor; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
