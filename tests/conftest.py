"""Eight virtual CPU devices, JAX at its strictest."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import jax
import numpy as np
import pytest

if TYPE_CHECKING:
    import runs

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Eight devices on two cores: a second program in flight can starve a collective of the first of its threads.
jax.config.update("jax_cpu_enable_async_dispatch", False)


# A test run started in the background inherits that Ctrl-C is ignored; the tests of Ctrl-C need Python's own handler.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_mesh_stays_set() -> Iterator[None]:
    """A mesh that a test sets and leaves set must not reach the next one."""
    with jax.set_mesh(jax.sharding.Mesh(np.empty((), dtype=object), ())):
        yield


@pytest.fixture
def torch() -> ModuleType:
    """PyTorch, for tests that compare with it; they are skipped where it is not installed (.ci/run on Python 3.13)."""
    return pytest.importorskip("torch")


@pytest.fixture
def on_mesh() -> Callable[[int, int, int], AbstractContextManager]:
    """on_mesh(data, fsdp, tensor) sets a mesh over as many devices as that takes."""
    from meshgpt.distributed.mesh import MeshShape, make_mesh

    def enter(data: int = 1, fsdp: int = 1, tensor: int = 1) -> AbstractContextManager:
        devices = jax.devices()[: math.prod((data, fsdp, tensor))]
        return jax.set_mesh(make_mesh(MeshShape(data=data, fsdp=fsdp, tensor=tensor), devices))

    return enter


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> "runs.Workshop":
    import runs

    return runs.make_workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def here(workshop: "runs.Workshop", capsys: pytest.CaptureFixture[str]) -> "runs.Here":
    import runs

    return runs.Here(workshop, capsys)


@pytest.fixture(scope="session")
def finished(workshop: "runs.Workshop") -> Path:
    """A finished GPT-J run. Not to be changed."""
    import runs

    return runs.make_finished(workshop, "gptj")


@pytest.fixture(scope="session")
def finished_gpt2(workshop: "runs.Workshop") -> Path:
    """A finished GPT-2 run. Not to be changed."""
    import runs

    return runs.make_finished(workshop, "gpt2")
