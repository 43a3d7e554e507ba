"""Low-bit, factored and orthogonal directions: against the papers' equations in NumPy, PyTorch and optax; on meshes."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import torch
from jax.sharding import PartitionSpec as P

from meshgpt import trees
from meshgpt.checkpoint import orbax_io
from meshgpt.distributed.mesh import spec
from meshgpt.errors import UserError
from meshgpt.optim import codecs
from meshgpt.optim.config import Adafactor, AdamW, AdamW4bit, AdamW8bit, Lion, Muon, Optimizer
from meshgpt.optim.moments import Blocked, Rank1
from meshgpt.optim.muon import orthogonal

# Rows of 640 and 96 columns: on a mesh of 8 their blocks of 256 and 128 begin and end within devices.
SHAPES: dict[str, tuple[tuple[int, ...], str]] = {
    "wte_VD": ((128, 96), "vocab_fsdp embed"),
    "q_DNH": ((2, 64, 8, 80), "layers fsdp heads _"),
    "o_NHD": ((2, 8, 16, 64), "layers heads _ fsdp"),
    "up_DF": ((2, 64, 640), "layers fsdp mlp"),
    "tiny_DF": ((2, 8, 16), "layers fsdp mlp"),
    "scale_D": ((2, 64), "layers _"),
}
MESHES = [(1, 8, 1), (1, 1, 8), (2, 2, 2)]
STEPS = 3
ALL = [AdamW(), AdamW8bit(), AdamW4bit(), Adafactor(), Lion(), Muon()]
LOW = [AdamW8bit(weight_decay=0.0), AdamW4bit(weight_decay=0.0)]


def kind(value: Any) -> str:
    return type(value).__name__


def gradients(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {
        name: (rng.normal(size=shape) * 10.0 ** rng.uniform(-3, 0, (*shape[:-1], 1))).astype(np.float32)
        for name, (shape, _) in SHAPES.items()
    }


def placed(tree: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jax.device_put(value, spec(SHAPES[name][1])) for name, value in tree.items()}


@functools.cache
def run(optim: Optimizer, mesh: tuple[int, int, int], bad: bool = False) -> tuple[list[dict], Any]:
    """The updates of some steps and the state after them, on the host; the last step `bad` or not."""
    with jax.set_mesh(tiny.mesh(*mesh)), jax.numpy_dtype_promotion("standard"):
        transformation = optim.transformation()
        params = placed(gradients(99))
        state = jax.jit(transformation.init)(params)
        update = jax.jit(lambda g, s, finite: transformation.update(g, s, params, finite=finite), donate_argnums=1)
        updates = []
        for step in range(STEPS + bad):
            before = jax.tree.map(np.asarray, state)
            new, state = update(placed(gradients(step)), state, jnp.asarray(step < STEPS))
            updates.append(jax.tree.map(np.asarray, new))
        if bad:
            tiny.assert_same_bits(state, before)
        for path, leaf in trees.leaves_with_names(state):
            if path.endswith("codes"):
                assert leaf.sharding.spec == spec(SHAPES[path.split("/")[-2]][1]), path
        return updates, jax.tree.map(np.asarray, state)


def matrix(name: str, x: np.ndarray) -> np.ndarray:
    """(stack, rows, columns) in NumPy's own words."""
    columns = {"wte_VD": 96, "q_DNH": 640, "o_NHD": 64, "up_DF": 640}[name]
    stack = 1 if name == "wte_VD" else 2
    return x.reshape(stack, -1, columns)


def nearest(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The values nearest to x, by search."""
    middles = (values[1:] + values[:-1]) / 2
    return values[np.searchsorted(middles, x)]


def rounded_by_blocks(x: np.ndarray, values: np.ndarray, block: int) -> np.ndarray:
    out = np.empty_like(x)
    for start in range(0, x.shape[-1], block):
        part = x[..., start : start + block]
        scale = np.abs(part).max(-1, keepdims=True)
        out[..., start : start + block] = nearest(values, part / scale) * scale
    return out


def rounded_by_rank1(x: np.ndarray) -> np.ndarray:
    scale = np.minimum(x.max(2, keepdims=True), x.max(1, keepdims=True))
    return nearest((np.arange(16) + 1) / 16, x / scale) * scale


def largest_update(b1: float, b2: float, count: int) -> float:
    """Of |m'| / sqrt(v') over all sequences of `count` gradients, by Cauchy and Schwarz, and 0.1% for rounding."""
    age = np.arange(count)
    first, second = ((1 - b) * b**age / (1 - b**count) for b in (b1, b2))
    return 1.001 * math.sqrt(np.sum(first * first / second))


def reference(optim: AdamW8bit | AdamW4bit, name: str) -> list[np.ndarray]:
    """Updates by the papers' algorithm in float64: dequantize, update, use, quantize; no more than Adam can give."""
    m = v = np.zeros(matrix(name, np.zeros(SHAPES[name][0])).shape)
    updates = []
    for step in range(STEPS):
        g = matrix(name, gradients(step)[name]).astype(np.float64)
        m, v = optim.b1 * m + (1 - optim.b1) * g, optim.b2 * v + (1 - optim.b2) * g * g
        t = step + 1
        update = (m / (1 - optim.b1**t)) / (np.sqrt(v / (1 - optim.b2**t)) + optim.eps)
        largest = largest_update(optim.b1, optim.b2, t)
        updates.append(np.clip(update, -largest, largest))
        if isinstance(optim, AdamW8bit):
            m = rounded_by_blocks(m, codecs.DYNAMIC_8.values.astype(np.float64), 256)
            v = rounded_by_blocks(v, codecs.DYNAMIC_8_UNSIGNED.values.astype(np.float64), 256)
        else:
            m = rounded_by_blocks(m, codecs.DYNAMIC_4.values.astype(np.float64), 128)
            v = rounded_by_rank1(v)
    return updates


@pytest.mark.parametrize("name", ["wte_VD", "q_DNH", "o_NHD", "up_DF"])
@pytest.mark.parametrize("optim", LOW, ids=kind)
def test_low_bit_updates_are_the_papers(optim: AdamW8bit | AdamW4bit, name: str) -> None:
    updates, _ = run(optim, (1, 1, 1))
    for step, expected in enumerate(reference(optim, name)):
        got = matrix(name, updates[step][name]).astype(np.float64)
        # A number halfway between two values may be rounded either way, which float32 and float64 decide differently.
        off = np.abs(got - expected) > 1e-4 * np.maximum(np.abs(expected), 1)
        assert off.mean() < 2e-3, (step, off.mean())


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("optim", ALL, ids=kind)
def test_updates_and_state_are_the_same_on_every_mesh(optim: Optimizer, mesh: tuple[int, int, int]) -> None:
    one, one_state = run(optim, (1, 1, 1))
    many, many_state = run(optim, mesh)
    for ours, theirs in zip(many, one, strict=True):
        for name, value in theirs.items():
            tiny.assert_close(ours[name], value, 2e-5, name)
    for (path, a), (_, b) in zip(*map(trees.leaves_with_names, (many_state, one_state)), strict=True):
        if a.dtype == np.uint8:
            assert (a == b).mean() > 0.999, path
        else:
            tiny.assert_close(a, b, 2e-5, path)


@pytest.mark.parametrize("optim", ALL, ids=kind)
def test_a_step_that_is_not_finite_leaves_every_bit_of_the_state(optim: Optimizer) -> None:
    run(optim, (1, 1, 1), bad=True)


@pytest.mark.parametrize("optim", LOW, ids=kind)
def test_small_matrices_and_vectors_stay_in_float32(optim: Optimizer) -> None:
    _, state = run(optim, (1, 1, 1))
    moments = state[0]
    assert isinstance(moments.mu["up_DF"], Blocked)
    assert isinstance(moments.nu["up_DF"], Blocked | Rank1)
    for name in ("tiny_DF", "scale_D"):
        assert moments.mu[name].dtype == moments.nu[name].dtype == np.float32
    adam, _ = run(AdamW(weight_decay=0.0), (1, 1, 1))
    low, _ = run(optim, (1, 1, 1))
    for name in ("tiny_DF", "scale_D"):
        np.testing.assert_array_equal(low[-1][name], adam[-1][name])


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        (AdamW(), 8.0),
        (AdamW(moment_dtype="bfloat16"), 6.0),
        (AdamW(moment_dtype="bfloat16", second_moment_dtype="bfloat16"), 4.0),
        (AdamW8bit(), 2.05),
        (AdamW4bit(), 1.05),
        (Adafactor(), 0.03),
        (Lion(), 4.0),
        (Lion(moment_dtype="bfloat16"), 2.0),
        (Muon(), 5.27),
    ],
    ids=lambda value: kind(value) if not isinstance(value, float) else str(value),
)
def test_state_bytes_of_a_parameter_of_gpt2(optim: Optimizer, expected: float) -> None:
    """GPT-2 124M, shapes alone; Muon keeps 8 bytes of the embeddings and 4 of the rest."""
    config = tiny.GPT2_124M
    with jax.set_mesh(tiny.mesh()):
        params = tiny.model(config).abstract_params()
        state = jax.eval_shape(optim.transformation().init, params)
    assert trees.nbytes(state) / trees.count(params) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("optim", LOW, ids=kind)
def test_no_state_is_ever_whole_in_float32(optim: Optimizer) -> None:
    """By the compiled program: what an update needs beside its arguments is a fraction of one float32 moment."""
    params = {"wte_VD": jnp.zeros((4096, 512)), "up_DF": jnp.zeros((12, 512, 2048))}
    transformation = optim.transformation()

    def update(g: Any, state: Any, finite: jax.Array) -> Any:
        return transformation.update(g, state, params, finite=finite)

    state = jax.eval_shape(transformation.init, params)
    program = jax.jit(update, donate_argnums=(0, 1)).lower(params, state, jnp.asarray(True)).compile()
    analysis = program.memory_analysis()
    moment = trees.nbytes(params)
    assert analysis.alias_size_in_bytes >= 0.99 * (moment + trees.nbytes(state)), "the state is updated in place"
    assert analysis.temp_size_in_bytes < 0.1 * moment


@pytest.mark.parametrize("optim", LOW, ids=kind)
def test_a_state_saved_on_one_mesh_is_read_on_another(optim: Optimizer, tmp_path: Any) -> None:
    import orbax.checkpoint as ocp

    with jax.set_mesh(tiny.mesh(1, 8, 1)):
        transformation = optim.transformation()
        params = placed(gradients(0))
        _, state = jax.jit(lambda g, s: transformation.update(g, s, g, finite=jnp.asarray(True)))(
            params, transformation.init(params)
        )
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as saver:
            saver.save(tmp_path / "0", args=ocp.args.Composite(**orbax_io.save_args({"opt_state": state})))
    with jax.set_mesh(tiny.mesh(2, 2, 2)):
        abstract = jax.eval_shape(transformation.init, jax.eval_shape(lambda: placed(gradients(0))))
        again = orbax_io.restore(tmp_path / "0", {"opt_state": abstract})["opt_state"]
        tiny.assert_same_bits(again, state)
        assert again[0].mu["up_DF"].codes.sharding.spec == P(None, "fsdp", "tensor")


def test_a_mesh_that_would_halve_a_byte_is_refused() -> None:
    with jax.set_mesh(tiny.mesh(1, 8, 1)), pytest.raises(UserError, match="two rows a byte"):
        AdamW4bit().transformation().init({"up_DF": jax.device_put(jnp.zeros((72, 64)), P("fsdp", None))})


def test_bf16_second_moments_need_a_short_memory() -> None:
    with pytest.raises(UserError, match="b2"):
        AdamW(second_moment_dtype="bfloat16", b2=0.999).transformation()


def test_adafactor_is_optax_s_for_every_layer() -> None:
    updates, _ = run(Adafactor(weight_decay=0.0), (1, 1, 1))
    theirs = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=2), optax.clip_by_block_rms(1.0))
    for name, columns in (("up_DF", 640), ("wte_VD", 96), ("scale_D", 0)):
        layers = [jnp.asarray(g.reshape(-1, columns) if columns else g) for g in _layer(name)]
        state = theirs.init(layers[0])
        with jax.numpy_dtype_promotion("standard"):
            for step, g in enumerate(layers):
                update, state = theirs.update(g, state, g)
                mine = updates[step][name]
                mine = mine if name == "wte_VD" else mine[0]
                tiny.assert_close(mine, np.asarray(update), 1e-4, f"{name} {step}")


def _layer(name: str) -> list[np.ndarray]:
    """The first layer's gradients of each step."""
    return [gradients(step)[name] if name == "wte_VD" else gradients(step)[name][0] for step in range(STEPS)]


def test_muon_is_pytorch_s_for_every_layer() -> None:
    """torch.optim.Muon works in bfloat16, hence the tolerance; the direction is what counts."""
    updates, _ = run(Muon(weight_decay=0.0), (1, 1, 1))
    adam, _ = run(AdamW(weight_decay=0.0), (1, 1, 1))
    np.testing.assert_array_equal(updates[-1]["wte_VD"], adam[-1]["wte_VD"])
    with jax.set_mesh(tiny.mesh()):
        transformation = Muon(weight_decay=0.0).transformation()
        tree = {"blocks": {"up_DF": jax.device_put(gradients(0)["up_DF"], spec("layers fsdp mlp"))}}
        state = transformation.init(tree)
        weight = torch.nn.Parameter(torch.zeros(64, 640))
        peer = torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        for step in range(STEPS):
            g = gradients(step)["up_DF"]
            tree = {"blocks": {"up_DF": jax.device_put(g, spec("layers fsdp mlp"))}}
            with jax.numpy_dtype_promotion("standard"):
                update, state = transformation.update(tree, state, tree, finite=jnp.asarray(True))
            before = weight.detach().clone()
            weight.grad = torch.from_numpy(g[1].copy())
            peer.step()
            theirs = (before - weight.detach()).numpy()
            mine = np.asarray(update["blocks"]["up_DF"])[1]
            cosine = (mine * theirs).sum() / np.linalg.norm(mine) / np.linalg.norm(theirs)
            assert cosine > 0.995, step
            assert np.linalg.norm(mine) == pytest.approx(np.linalg.norm(theirs), rel=0.03)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_orthogonal_keeps_singular_vectors_and_levels_singular_values(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    inner = u.T @ np.asarray(orthogonal(jnp.asarray(x))) @ vt.T
    assert (np.abs(inner - np.diag(np.diag(inner))) < 1e-3).all()
    assert ((np.diag(inner) > 0.6) & (np.diag(inner) < 1.3)).all()


def test_lion_is_its_paper_s() -> None:
    updates, _ = run(Lion(weight_decay=0.0), (1, 1, 1))
    m = np.zeros(SHAPES["up_DF"][0])
    for step in range(STEPS):
        g = gradients(step)["up_DF"].astype(np.float64)
        assert (updates[step]["up_DF"] == np.sign(0.9 * m + 0.1 * g)).mean() > 0.999
        m = 0.99 * m + 0.01 * g
