"""Low-rank adapters: beside PEFT's on the same numbers, on every mesh, and in the compiled step."""

import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from meshgpt import trees
from meshgpt.config import Data, Run
from meshgpt.convert.adapter import _modules, _tensors, export_adapter
from meshgpt.distributed.mesh import spec
from meshgpt.errors import UserError
from meshgpt.models import layers
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.layers import Execution
from meshgpt.models.lora import LowRank
from meshgpt.models.model import ModelConfig
from meshgpt.models.trainable import Full, LastLayers, LoRA, Trainable
from meshgpt.objectives.loss import NextToken
from meshgpt.optim.config import Adafactor, AdamW4bit, Muon, Optimizer
from meshgpt.training.program import Program
from meshgpt.trees import Tree

ALL = ("attn/*", "mlp/*")


@pytest.fixture(autouse=True)
def _quick_compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Most of these tests compile for longer than they run."""
    jax.config.update("jax_disable_most_optimizations", "compiled_step" not in request.node.name)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def run_of(config: ModelConfig, part: Trainable, **changes: object) -> Run:
    settings = {"model": config, "data": Data(store="none"), "steps": 1000, "global_batch": 8, "init": "a base"}
    return Run(trainable=part, **(settings | changes))  # type: ignore[arg-type]


@functools.cache
def drawn(config: ModelConfig, part: LoRA) -> dict[str, np.ndarray]:
    """Random adapters by name, B too."""
    with jax.set_mesh(tiny.mesh()):
        params, _ = part.start({}, tiny.model(config).abstract_params(), jax.random.key(0))
    rng = np.random.default_rng(1)
    return {
        name: (rng.normal(size=leaf.shape) * 0.3).astype(np.float32) for name, leaf in trees.leaves_with_names(params)
    }


def placed(config: ModelConfig, part: LoRA) -> tuple[Tree, Tree]:
    """Those adapters, and the frozen base, on the mesh that is set."""
    params, frozen = part.start(tiny.params(config), tiny.model(config).abstract_params(), jax.random.key(0))
    values = drawn(config, part)
    put = trees.map_with_names(lambda name, leaf: jax.device_put(values[name], jax.typeof(leaf).sharding.spec), params)
    return put, frozen


def gradients(
    run: Run, params: Tree, frozen: Tree, rows: np.ndarray, key: jax.Array | None = None
) -> tuple[float, dict[str, np.ndarray]]:
    """The mean loss, and its gradients by name."""
    tokens, weights = (a[0] for a in tiny.batch(rows))
    loss = Program(run=run)._loss(frozen, NextToken())

    @jax.jit
    def both(params: Tree) -> tuple[jax.Array, Tree]:
        (total, weight), grads = jax.value_and_grad(loss, has_aux=True)(params, tokens, weights, key)
        return total / weight, jax.tree.map(lambda g: g / weight, grads)

    mean, grads = both(params)
    return float(mean), tiny.to_numpy(grads)


@pytest.mark.parametrize(
    ("config", "targets"),
    [(tiny.GPT2, ALL), (tiny.GPT2, ("attn/q", "v", "mlp.c_proj")), (tiny.GPTJ, ALL)],
    ids=["gpt2", "gpt2-some", "gptj"],
)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft calls transformers by old names
def test_logits_and_gradients_are_peft_s(config: ModelConfig, targets: tuple[str, ...], tmp_path: Path) -> None:
    import peft

    part, rows = LoRA(rank=3, alpha=5.0, targets=targets), tiny.tokens(8, config.n_positions)
    with jax.set_mesh(tiny.mesh()):
        params, frozen = placed(config, part)
        export_adapter(params, part, config, "the base", tmp_path / "adapter")
        loss, ours = gradients(run_of(config, part), params, frozen, rows)
        decoder = tiny.model(config).bind(part.joined(params, frozen, None))
        logits = np.asarray(decoder.logits(decoder.hidden(jax.device_put(rows, spec("batch _")))))
        expected, written = {}, {}
        tree = trees.map_with_names(lambda name, _: jnp.asarray(ours[name]), params)
        for module in _modules(params, config):
            expected |= _tensors(module, tree)
            written |= _tensors(module, jax.tree.map(jnp.ones_like, params))
    peer = peft.PeftModel.from_pretrained(tiny.torch_peer(config), tmp_path / "adapter", is_trainable=True).eval()
    tokens = torch.from_numpy(rows).long()
    theirs = peer(tokens, labels=tokens)
    np.testing.assert_allclose(logits[..., : config.vocab_size], theirs.logits.detach().numpy(), atol=1e-4)
    assert abs(loss - theirs.loss.item()) < 1e-5
    theirs.loss.backward()
    found = {n.replace(".default", ""): p.grad.numpy() for n, p in peer.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # GPT-2's c_attn has room for more than our blocks on the diagonal, which stays zero and is not trained here.
        tiny.assert_close(gradient, found[name] * written[name], 1e-3, name)


def test_every_mesh_and_execution_computes_the_same() -> None:
    config = tiny.GPTJ
    part, rows = LoRA(rank=3, alpha=5.0, targets=ALL, dropout=0.25), tiny.tokens(8, 13)
    key = jax.random.key(7)
    cases = [((1, 1, 1), Execution()), ((2, 2, 2), Execution(unroll=0, remat="named"))]
    results = []
    for mesh, execution in cases:
        with jax.set_mesh(tiny.mesh(*mesh)):
            run = run_of(config, part, execution=execution)
            params, frozen = placed(config, part)
            results.append(gradients(run, params, frozen, rows, key))
    for loss, grads in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        for name, value in grads.items():
            tiny.assert_close(value, results[0][1][name], 1e-3, name)


def test_adapters_lie_on_the_mesh_as_their_weights_do() -> None:
    part = LoRA(rank=4, targets=ALL)
    with jax.set_mesh(tiny.mesh(2, 2, 2)):
        abstract = trees.leaves_with_names(Program(run=run_of(tiny.GPTJ, part)).abstract_params())
        specs = {name: leaf.sharding.spec for name, leaf in abstract}
        merged = part.merged(*placed(tiny.GPTJ, part))
        base = tiny.params(tiny.GPTJ)
    assert specs["blocks/attn/q_DNH/a_DR"] == spec("layers fsdp _")
    assert specs["blocks/attn/q_DNH/b_RNH"] == spec("layers _ heads _")
    assert specs["blocks/attn/o_NHD/a_NHR"] == spec("layers heads _ _")
    assert specs["blocks/attn/o_NHD/b_RD"] == spec("layers _ fsdp")
    assert specs["blocks/mlp/down_FD/a_FR"] == spec("layers mlp _")
    for (name, a), (_, b) in zip(*map(trees.leaves_with_names, (merged, base)), strict=True):
        assert a.sharding == b.sharding, name
        assert a.dtype == b.dtype


@pytest.mark.parametrize("optim", [AdamW4bit(), Adafactor(), Muon()], ids=lambda optim: type(optim).__name__)
def test_every_optimizer_takes_adapters(optim: Optimizer) -> None:
    """With dropout and accumulation: traced, with shardings checked, for a mesh of all axes."""
    part = LoRA(rank=4, targets=ALL, dropout=0.1)
    with jax.set_mesh(tiny.mesh(2, 2, 2)):
        Program(run=run_of(tiny.GPTJ, part, global_batch=8, accumulate=2, seq_len=8, optim=optim)).lower()


@pytest.mark.parametrize("config", tiny.FAMILIES, ids=tiny.name)
def test_merged_is_w_plus_a_b(config: ModelConfig) -> None:
    part = LoRA(rank=3, alpha=5.0, targets=("attn/o", "attn/k"))
    with jax.set_mesh(tiny.mesh(1, 2, 2)):
        merged = tiny.to_numpy(part.merged(*placed(config, part)))
    values, low = tiny.numpy_params(config), drawn(config, part)
    for name, equation in (("o_NHD", "lnhr,lrd->lnhd"), ("k_DNH", "ldr,lrnh->ldnh")):
        path = f"blocks/attn/{name}"
        a, b = (next(v for n, v in low.items() if n.startswith(f"{path}/{first}_")) for first in "ab")
        np.testing.assert_allclose(merged[path], values[path] + 5 / 3 * np.einsum(equation, a, b), atol=1e-5)
    np.testing.assert_array_equal(merged["blocks/mlp/up_DF"], values["blocks/mlp/up_DF"])


def test_the_first_loss_is_the_base_s_to_the_bit() -> None:
    rows, part = tiny.tokens(8, 16), LoRA(targets=ALL)
    with jax.set_mesh(tiny.mesh()):
        program = Program(run=run_of(tiny.GPT2, part))
        state, frozen = program.start(tiny.params(tiny.GPT2))
        loss, grads = gradients(program.run, state.params, frozen, rows)
        whole, _ = gradients(run_of(tiny.GPT2, Full()), tiny.params(tiny.GPT2), {}, rows)
        again, _ = program.start(tiny.params(tiny.GPT2))
        tiny.assert_same_bits(state.params, again.params)
    assert loss == whole
    assert all((value == 0).all() == name.split("/")[-1].startswith("a_") for name, value in grads.items())
    a = np.asarray(trees.leaves_with_names(state.params)[0][1])
    assert 0.9 < np.abs(a).max() * np.sqrt(tiny.GPT2.mlp_width if "down" in str(a.shape) else 16) <= 4.0


def test_dropout_is_of_the_adapter_s_input() -> None:
    """What is dropped is x before A, by the rate, in training alone; the base's product sees all of x."""
    x = jnp.ones((1, 4096, 1), jnp.float32)
    one = jnp.ones((1, 1), jnp.float32)
    with jax.set_mesh(tiny.mesh()):
        for key, expected in ((None, {3.0}), (jax.random.key_data(jax.random.key(0)), {1.0, 1 + 2 / 0.75})):
            low = LowRank(one, one, one, key, 2.0, 0.25)
            y = np.asarray(layers.product("BTD,DF->BTF", x, low, "fsdp mlp", "batch seq mlp"))
            assert {round(float(v), 5) for v in np.unique(y)} == {round(v, 5) for v in expected}
    assert (y == 1.0).mean() == pytest.approx(0.25, abs=0.03)


class Halved:
    """A frozen weight that is no array."""

    def __init__(self, half: jax.Array):
        self.half = half

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        return (self.half * 2).astype(dtype)


jax.tree_util.register_pytree_node(Halved, lambda h: ((h.half,), None), lambda _, leaves: Halved(*leaves))


def test_a_base_may_be_of_other_weights() -> None:
    """As a quantized one is: the loss and the merged model are those of the arrays that they stand for."""
    part, rows = LoRA(rank=3, targets=ALL), tiny.tokens(8, 13)
    with jax.set_mesh(tiny.mesh(1, 2, 2)):
        params, frozen = placed(tiny.GPTJ, part)
        halved = {"base": {**frozen["base"], "blocks": {**frozen["base"]["blocks"]}}}
        halved["base"]["blocks"]["attn"] = jax.tree.map(lambda w: Halved(w / 2), frozen["base"]["blocks"]["attn"])
        run = run_of(tiny.GPTJ, part)
        loss, grads = gradients(run, params, frozen, rows)
        other, same = gradients(run, params, halved, rows)
        tiny.assert_same_bits(part.merged(params, halved), part.merged(params, frozen))
    assert loss == other
    for name, value in grads.items():
        np.testing.assert_array_equal(value, same[name], err_msg=name)


def test_the_compiled_step_keeps_nothing_for_what_is_frozen() -> None:
    """By its memory analysis: neither state nor gradients of the frozen parameters, in float32 as large as they."""
    config = GPT2Config(n_layers=4, vocab_size=512, n_positions=64, d_model=256, n_heads=4)
    temporary, states = {}, {}
    with jax.set_mesh(tiny.mesh()):
        for part in (Full(), LoRA(rank=2, targets=ALL), LastLayers(layers=1)):
            program = Program(run=run_of(config, part, global_batch=2, seq_len=16))
            kind = type(part).__name__
            analysis = program.lower().compile().memory_analysis()
            temporary[kind] = analysis.temp_size_in_bytes
            states[kind] = trees.nbytes(program.abstract().items())
            assert analysis.output_size_in_bytes < states[kind] + 65536
        blocks = trees.nbytes(program.model.abstract_params()["blocks"])
        whole = trees.nbytes(program.model.abstract_params())
    assert states["Full"] == pytest.approx(3 * whole, rel=1e-3)
    assert states["LoRA"] < 0.05 * whole
    assert states["LastLayers"] == pytest.approx(3 * blocks / 4, rel=1e-2)
    # What is left are activations, and copies of weights for the CPU's matmuls: all three have those.
    assert temporary["LoRA"] < temporary["Full"] - 0.95 * whole, temporary
    assert temporary["LastLayers"] < temporary["Full"] - 0.95 * (whole - blocks / 4), temporary


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"trainable\.rank=0"),
        ({"alpha": 0.0}, r"trainable\.alpha=0\.0"),
        ({"alpha": float("nan")}, r"trainable\.alpha=nan"),
        ({"dropout": 1.0}, r"trainable\.dropout=1\.0"),
        ({"dropout": -0.1}, r"trainable\.dropout=-0\.1"),
        ({"targets": ()}, "targets is empty"),
    ],
)
def test_bad_adapters_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoRA(**settings)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (LoRA(targets=("attn/q", "attention/query")), r"named 'attention/query'; the nearest: .*attn"),
        (LoRA(targets=("atn/q",)), r"named 'atn/q'; the nearest: attn/q"),
        (LoRA(targets=("wte_VD",)), r"named 'wte_VD'"),
        (LoRA(targets=("ln_1/*",)), r"named 'ln_1/\*'"),
        (LoRA(rank=17), r"trainable\.rank=17 is above 16, the smaller side of blocks/attn/q_DNH"),
        (LastLayers(layers=3), r"trainable\.layers=3: the model has 2 layers"),
    ],
)
def test_parts_that_a_model_does_not_have_are_refused(part: Trainable, message: str) -> None:
    with jax.set_mesh(tiny.mesh()), pytest.raises(UserError, match=message):
        Program(run=run_of(tiny.GPT2, part)).train_step()


def test_targets_by_any_name() -> None:
    with jax.set_mesh(tiny.mesh()):
        abstract = tiny.model(tiny.GPT2).abstract_params()
    everything = [f"blocks/{n}" for n in ("attn/k_DNH", "attn/o_NHD", "attn/q_DNH", "attn/v_DNH")]
    assert LoRA(targets=("attn/*",)).names(abstract) == everything
    assert LoRA(targets=("c_attn", "attn/o_NHD")).names(abstract) == everything
    assert LoRA(targets=("q", "blocks/attn/q_DNH", "q_proj")).names(abstract) == ["blocks/attn/q_DNH"]
    assert LoRA(targets=("c_proj",)).names(abstract) == ["blocks/attn/o_NHD", "blocks/mlp/down_FD"]
