"""What must be said to JAX before it starts."""

import os
from pathlib import Path

import jax


def start() -> None:
    """Settings of a command that computes; call it before anything asks for a device.

    The compilation cache is on, in JAX_COMPILATION_CACHE_DIR or the user's cache folder, so that a program compiles
    once a machine. With several CPU devices (JAX_NUM_CPU_DEVICES, for trying out a mesh) programs run one at a time: a
    second one in flight can take the threads that a collective of the first waits for.
    """
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "meshgpt" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    several = jax.config.jax_num_cpu_devices > 1  # pyright: ignore[reportAttributeAccessIssue]
    if several or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_cpu_enable_async_dispatch", False)
