"""What `meshgpt doctor` says: the devices, their memory and peak, the versions, and meshes that fit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import meshgpt
from meshgpt.errors import UserError
from meshgpt.models.flops import peak_flops

if TYPE_CHECKING:  # `meshgpt --help` must not wait for jax
    from jax import Device

PACKAGES = (
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "numpy",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "tyro",
    "tensorboardX",
    "huggingface-hub",
    "lm-eval",
)
_GIB = 1 << 30
# (a file that exists where the device is plugged in, JAX's name for it, a reader's, what to install)
_PLUGGED_IN = (
    ("/dev/nvidiactl", "gpu", "an NVIDIA GPU", "pip install 'meshgpt[cuda13]', or [cuda12] for a driver before 580"),
    ("/dev/accel0", "tpu", "a TPU", "pip install 'meshgpt[tpu]'"),
    ("/dev/vfio/0", "tpu", "a TPU", "pip install 'meshgpt[tpu]'"),
)


def doctor(arguments: Sequence[str]) -> None:
    """meshgpt doctor"""
    if arguments:
        raise UserError(f"meshgpt doctor takes no arguments, and got {arguments[0]!r}")
    print(examine())


def examine() -> str:
    """Looks at this machine and returns lines for a reader; works without accelerators.

    Starts JAX's backend, and so takes a few seconds, and on an accelerator takes hold of it. Where several processes
    train together it speaks of the devices of this one alone.
    """
    import jax

    from meshgpt.runtime import quiet_libtpu

    quiet_libtpu()
    try:
        devices = jax.local_devices()
    except RuntimeError as error:  # what JAX raises when a plugin that is installed cannot start
        return "\n\n".join([_versions(), _machine(), f"devices: JAX cannot start: {error}", *_hints("")])
    parts = [_versions(), _machine(), describe_devices(devices), suggest_meshes(len(devices))]
    return "\n\n".join([*parts, *_hints(devices[0].platform)])


def describe_devices(devices: Sequence[Device]) -> str:
    """The kinds of `devices`, with memory where the device tells, and the peak that MFU is measured against."""
    lines = [f"devices: {len(devices)} ({devices[0].platform})"]
    for kind, count in Counter(device.device_kind for device in devices).items():
        device = next(device for device in devices if device.device_kind == kind)
        peak = peak_flops(kind)
        known = "peak not known, so MFU is not shown" if peak is None else f"peak {peak / 1e12:.0f} TFLOP/s in 16 bits"
        lines.append(f"  {count} x {kind}: {_device_memory(device)}{known}")
    return "\n".join(lines)


def suggest_meshes(device_count: int) -> str:
    """The flags of meshes for so many devices, and when each is the right one."""
    if device_count == 1:
        return "mesh: one device, no flags needed"
    tensor = max(size for size in (1, 2, 4, 8) if device_count % size == 0)
    choices = [
        (f"--mesh.data {device_count}", "the model and its optimizer state fit on one device"),
        (f"--mesh.data 1 --mesh.fsdp {device_count}", "they do not: every device keeps a part of them"),
    ]
    if tensor > 1:
        flags = f"--mesh.data 1 --mesh.fsdp {device_count // tensor} --mesh.tensor {tensor}"
        choices.append((flags, "a batch has fewer sequences than there are devices, or one layer is too large"))
    width = max(len(flags) for flags, _ in choices)
    return "\n".join(
        [f"meshes for {device_count} devices:", *(f"  {flags:{width}}  {when}" for flags, when in choices)]
    )


def _device_memory(device: Device) -> str:
    statistics = device.memory_stats()  # None on a CPU
    if not statistics or "bytes_limit" not in statistics:
        return ""
    return (
        f"{statistics['bytes_limit'] / _GIB:.1f} GiB for JAX, {statistics.get('bytes_in_use', 0) / _GIB:.1f} in use, "
    )


def _versions() -> str:
    found = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"meshgpt {meshgpt.__version__} on {platform.platform()}\n  " + "\n  ".join(found)


def _machine() -> str:
    free = shutil.disk_usage(Path.cwd()).free / _GIB
    return f"machine: {os.cpu_count()} CPU cores, {_host_memory()}{free:.1f} GiB of disk free here"


def _host_memory() -> str:
    try:
        pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not told on this system
        return ""
    return f"{pages * page / _GIB:.1f} GiB of memory, "


def _hints(backend: str) -> list[str]:
    """What to install where a device is plugged in that JAX does not use."""
    for file, needs, name, remedy in _PLUGGED_IN:
        if Path(file).exists() and backend != needs:
            return [f"{name} is here but JAX does not use it: {remedy}"]
    return []
