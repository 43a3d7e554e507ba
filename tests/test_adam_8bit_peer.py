"""AdamW8bit beside bitsandbytes' own 8-bit AdamW: how far both are from float32, and how large an update can be."""

import functools

import bitsandbytes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from meshgpt.distributed.mesh import spec
from meshgpt.optim.config import AdamW, AdamW4bit, AdamW8bit, Optimizer

ROWS, COLUMNS = 64, 256
B1, EPS = 0.9, 1e-8


@functools.cache
def gradients(sigma: float, steps: int) -> list[np.ndarray]:
    """Columns whose sizes are lognormal: within a block of 256 some are thousands of times smaller than others."""
    rng = np.random.default_rng(0)
    sizes = np.exp(sigma * rng.normal(size=COLUMNS))
    return [(rng.normal(size=(ROWS, COLUMNS)) * sizes).astype(np.float32) for _ in range(steps)]


def exact(given: list[np.ndarray], b2: float) -> np.ndarray:
    """Adam's updates in float64 (Kingma and Ba 2015, algorithm 1)."""
    m = v = np.zeros((ROWS, COLUMNS))
    updates = []
    for step, g in enumerate(given, start=1):
        m, v = B1 * m + (1 - B1) * g, _second(v, g.astype(np.float64), b2)
        updates.append(m / (1 - B1**step) / (np.sqrt(v / (1 - b2**step)) + EPS))
    return np.stack(updates)


def _second(v: np.ndarray, g: np.ndarray, b2: float) -> np.ndarray:
    return b2 * v + (1 - b2) * g * g


def peer(given: list[np.ndarray], b2: float) -> np.ndarray:
    weight = torch.nn.Parameter(torch.zeros(ROWS, COLUMNS))
    settings = {"lr": 1.0, "betas": (B1, b2), "eps": EPS, "weight_decay": 0.0, "min_8bit_size": 1024}
    optimizer = bitsandbytes.optim.AdamW8bit([weight], **settings)
    updates = []
    for g in given:
        weight.data.zero_()
        weight.grad = torch.from_numpy(g.copy())
        optimizer.step()
        updates.append(-weight.detach().numpy().copy())
    return np.stack(updates)


def ours(optim: Optimizer, given: list[np.ndarray], mesh: tuple[int, int, int]) -> np.ndarray:
    with jax.set_mesh(tiny.mesh(*mesh)), jax.numpy_dtype_promotion("standard"):
        transformation = optim.transformation()

        def placed(g: np.ndarray) -> dict[str, jax.Array]:
            return {"up_DF": jax.device_put(g, spec("fsdp mlp"))}

        state = jax.jit(transformation.init)(placed(given[0]))
        update = jax.jit(lambda g, s: transformation.update(g, s, g, finite=jnp.asarray(True)))
        updates = []
        for g in given:
            new, state = update(placed(g), state)
            updates.append(np.asarray(new["up_DF"]))
    return np.stack(updates)


def error(updates: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(updates - wanted))))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("sigma", "b2", "mesh"),
    [
        (2.0, 0.95, (1, 1, 1)),
        (2.0, 0.95, (2, 2, 2)),
        (2.0, 0.95, (1, 8, 1)),
        (3.0, 0.95, (1, 1, 1)),
        (2.0, 0.999, (1, 1, 1)),
        (0.0, 0.95, (1, 1, 1)),
    ],
)
def test_updates_are_no_worse_than_bitsandbytes(sigma: float, b2: float, mesh: tuple[int, int, int]):
    given = gradients(sigma, 30)
    wanted = exact(given, b2)
    theirs = peer(given, b2)
    found = ours(AdamW8bit(weight_decay=0.0, b1=B1, b2=b2, eps=EPS), given, mesh)
    assert error(found, wanted) <= error(theirs, wanted)
    assert np.abs(found).max() <= max(np.abs(theirs).max(), np.abs(wanted).max())


@pytest.mark.parametrize("optim", [AdamW(weight_decay=0.0), AdamW8bit(weight_decay=0.0), AdamW4bit(weight_decay=0.0)])
def test_no_update_exceeds_what_gradients_can_give(optim: AdamW | AdamW8bit | AdamW4bit):
    """Gradients that vanish after a while leave m above v in few bits; float32's bound holds all the same."""
    given = [g * (1.0 if step < 5 else 1e-4) for step, g in enumerate(gradients(3.0, 40))]
    counts = np.arange(1, 41)
    a = [(1 - optim.b1) * optim.b1 ** np.arange(t) / (1 - optim.b1**t) for t in counts]
    c = [(1 - optim.b2) * optim.b2 ** np.arange(t) / (1 - optim.b2**t) for t in counts]
    bound = np.array([np.sqrt(np.sum(x * x / y)) for x, y in zip(a, c, strict=True)])  # Cauchy and Schwarz
    found = np.abs(ours(optim, given, (1, 1, 1))).max(axis=(1, 2))
    assert (found <= bound * 1.002).all()
