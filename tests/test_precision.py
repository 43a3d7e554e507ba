"""Which dtype computes where."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from meshgpt.distributed.mesh import spec
from meshgpt.models.precision import Precision


@pytest.mark.parametrize(("platform", "expected"), [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")])
def test_auto_computes_in_16_bits_on_accelerators_only(platform: str, expected: str) -> None:
    assert Precision().resolve(platform).compute == expected
    assert Precision(compute="float32").resolve(platform).compute == "float32"
    assert Precision().params_dtype == jnp.float32


def test_bfloat16_computes_close_to_float32_with_float32_parameters() -> None:
    config = dataclasses.replace(tiny.GPTJ, n_layers=1)
    rows = tiny.tokens(2, 8)
    outputs = {}
    with jax.set_mesh(tiny.mesh()):
        for compute in ("float32", "bfloat16"):
            model = tiny.model(config, precision=Precision(compute=compute))
            hidden = jax.jit(lambda p, t, model=model: model.bind(p).hidden(t))
            outputs[compute] = hidden(tiny.params(config), jax.device_put(rows, spec("batch _")))
            assert outputs[compute].dtype == jnp.dtype(compute)
            assert {leaf.dtype for leaf in jax.tree.leaves(model.abstract_params())} == {jnp.dtype("float32")}
    difference = np.abs(np.asarray(outputs["bfloat16"], np.float32) - np.asarray(outputs["float32"]))
    assert 0 < difference.max() < 0.1


def test_parameters_can_be_16_bits() -> None:
    with jax.set_mesh(tiny.mesh()):
        shapes = tiny.model(tiny.GPT2, precision=Precision(params="bfloat16")).abstract_params()
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("bfloat16")}
