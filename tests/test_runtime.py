"""What JAX is told before it starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from meshgpt import runtime

PROGRAM = """import json, os, jax
from meshgpt import runtime
runtime.start()
names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_cpu_enable_async_dispatch")
share = os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"]
print(json.dumps([*(jax.config.values[name] for name in names), share]))
"""


def settings(**environment: str) -> list:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "XDG_"))}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=kept | environment, capture_output=True, text=True, check=True
    )
    return json.loads(ended.stdout)


def test_the_cache_is_the_users_and_programs_take_turns(tmp_path: Path):
    assert settings(XDG_CACHE_HOME=str(tmp_path)) == [str(tmp_path / "meshgpt" / "xla"), 0.5, False, "0.92"]


def test_the_users_own_cache_is_kept(tmp_path: Path):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "7"}
    assert settings(**cache) == [str(tmp_path), 7.0, False, "0.92"]
    assert settings(**cache, XLA_PYTHON_CLIENT_MEM_FRACTION="0.5")[3] == "0.5"


def test_a_run_says_what_its_programs_were_compiled_with(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    assert runtime.compiled_with() == {"jax": jax.__version__, "xla_flags": "--xla_dump_to=x"}
    monkeypatch.setenv("XLA_FLAGS", "")
    assert runtime.compiled_with() == {"jax": jax.__version__}


FAULTS = """import resource, sys
import numpy as np
from meshgpt import runtime
if sys.argv[1] == "keep":
    runtime.keep_freed_memory()
def allocate():
    np.ones(1 << 24, np.float32)  # 64 MiB, touched and freed
allocate()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    allocate()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    ended = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
    return int(ended.stdout)


def test_freed_memory_is_kept_for_the_next_step():
    given_back = page_faults("leave")
    assert page_faults("keep") < 100
    assert given_back > 100  # the check can fail: by default the same program faults
