"""Eight virtual CPU devices, JAX at its strictest."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Eight devices on two cores: a second program in flight can starve a collective of the first of its threads.
jax.config.update("jax_cpu_enable_async_dispatch", False)


@pytest.fixture
def on_mesh() -> Callable[[int, int, int], AbstractContextManager]:
    """on_mesh(data, fsdp, tensor) sets a mesh over as many devices as that takes."""
    from meshgpt.axes import MeshShape, make_mesh

    def enter(data: int = 1, fsdp: int = 1, tensor: int = 1) -> AbstractContextManager:
        devices = jax.devices()[: math.prod((data, fsdp, tensor))]
        return jax.set_mesh(make_mesh(MeshShape(data=data, fsdp=fsdp, tensor=tensor), devices))

    return enter
