"""What must be said to JAX before it starts."""

import ctypes
import os
import sys
from pathlib import Path

import jax

# mallopt(3)'s numbers.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def quiet_libtpu() -> None:
    """Where libtpu is installed and no TPU is: keeps it from looking for one and from logging that there is none."""
    if os.environ.get("TPU_SKIP_MDS_QUERY") != "1":  # JAX sets it when it is imported on such a machine
        return
    for name, value in {
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)


def keep_freed_memory() -> None:
    """Tells glibc's malloc to keep what is freed for the next step, instead of giving it back to the system.

    A step on the CPU allocates and frees the same hundreds of megabytes every time. Given back, they return as page
    faults: a third of the CPU time of a step of a 40M model (docs/performance.md). From mallopt(3): no allocation by
    mmap, no trimming, one arena. For a training run; where one large thing is converted once, it only holds memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:  # another C library
        return
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1)):
        mallopt(option, value)


def compiled_with() -> dict[str, str]:
    """What decides how XLA compiles, beside the program: JAX's version, and the flags in the environment."""
    flags = {name.lower(): os.environ[name] for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") if os.environ.get(name)}
    return {"jax": jax.__version__, **flags}


def take_turns() -> None:
    """Programs on a CPU run one at a time; call it before anything asks for a device.

    One that is dispatched while another runs has its memory from then on: training would hold the temporaries of two
    steps, or three (13.8 GB instead of 5.1 at GPT-2 124M, and page faults for a third of the time). And where there
    are several devices it can take the threads that a collective of the first waits for.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def start() -> None:
    """Settings of a command that computes; call it before anything asks for a device.

    The compilation cache is on, in JAX_COMPILATION_CACHE_DIR or the user's cache folder, so that a program compiles
    once a machine.
    """
    quiet_libtpu()
    take_turns()
    # Of a GPU's memory JAX takes 75% by itself, and nothing else trains on it; the rest is for CUDA's own needs.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "meshgpt" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
