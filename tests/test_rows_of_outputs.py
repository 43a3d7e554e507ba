"""The layout of generation against numpy's products."""

import jax
import numpy as np
import pytest
import tiny

from meshgpt.inference.cpu_layout import RowsOfOutputs
from meshgpt.models.layers import Product


@pytest.mark.parametrize(
    ("equation", "weight", "inputs", "x", "out"),
    [
        ("BTD,DF->BTF", (6, 10), 1, (2, 3, 6), "batch seq mlp"),
        ("BTD,DNH->BTNH", (6, 5, 2), 1, (1, 1, 6), "batch seq heads _"),
        ("BTab,abD->BTD", (5, 2, 6), 2, (2, 3, 5, 2), "batch seq embed"),
        ("BTD,DF->BTF", (6, 3), 1, (2, 3, 6), "batch seq mlp"),  # fewer outputs than parts
    ],
)
def test_products_are_numpys(equation: str, weight: tuple, inputs: int, x: tuple, out: str) -> None:
    random = np.random.default_rng(0)
    w, given = random.standard_normal(weight).astype(np.float32), random.standard_normal(x).astype(np.float32)
    with jax.set_mesh(tiny.mesh(1, 1, 1)):
        made = RowsOfOutputs.of(jax.numpy.asarray(w), inputs)
        assert isinstance(made, Product)
        found = jax.jit(lambda made, x: made.product(equation, x, "", out))(made, given)
    np.testing.assert_allclose(found, np.einsum(equation, given.astype(np.float64), w), atol=1e-5)
