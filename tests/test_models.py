"""Models as pure functions: their parameters, on any mesh, and what does not fit one."""

import dataclasses
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from meshgpt import trees
from meshgpt.distributed.mesh import MeshShape
from meshgpt.errors import UserError
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.gptj import GPTJConfig
from meshgpt.models.model import Model, ModelConfig, check_divisibility, parameter_shapes
from meshgpt.models.precision import Precision

ARCHITECTURE = Path(__file__).parents[1] / "docs" / "architecture.md"


@pytest.mark.parametrize(("config", "published"), [(GPT2Config(), 124_439_808), (GPTJConfig(), 6_050_882_784)])
def test_parameter_count_is_the_published_one(config: ModelConfig, published: int) -> None:
    config = dataclasses.replace(config, vocab_multiple=1)
    with jax.set_mesh(tiny.mesh(2, 2, 2) if config.vocab_size % 4 == 0 else tiny.mesh()):
        assert trees.count(Model(config=config).abstract_params()) == published


HEADS = dataclasses.replace(tiny.GPT2, tied_head=False), dataclasses.replace(tiny.GPTJ, tied_head=True)


@pytest.mark.parametrize("config", [*tiny.FAMILIES, *HEADS])
def test_parameters_are_those_of_the_architecture_document_and_of_the_hugging_face_table(config: ModelConfig) -> None:
    documented = set()
    for line in ARCHITECTURE.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 7 and "`" in cells[1] and _has(config, cells[3], cells[4]):
            names = re.findall(r"`([^`]+)`", cells[1])
            folder = names[0].rpartition("/")[0]
            documented |= {name if "/" in name or not folder else f"{folder}/{name}" for name in names}
    with jax.set_mesh(tiny.mesh()):
        ours = {name for name, _ in trees.leaves_with_names(tiny.model(config).abstract_params())}
    assert ours == documented
    assert ours == tiny.paths(config)


def _has(config: ModelConfig, gpt2: str, gptj: str) -> bool:
    stated = gptj if isinstance(config, GPTJConfig) else gpt2
    return stated == "yes" or (stated == "untied only" and not config.tied_head)


@pytest.mark.parametrize("config", tiny.FAMILIES)
def test_shapes_need_no_mesh_and_are_those_of_the_parameters(config: ModelConfig) -> None:
    with jax.set_mesh(tiny.mesh(1, 2, 2)):
        params = tiny.model(config).abstract_params()
        beside = parameter_shapes(config)
    assert beside == parameter_shapes(config) == {name: leaf.shape for name, leaf in trees.leaves_with_names(params)}


def test_initialisation_does_not_depend_on_the_mesh() -> None:
    values = {}
    for shape in ((1, 1, 1), (2, 2, 2)):
        with jax.set_mesh(tiny.mesh(*shape)):
            params = jax.jit(tiny.model(tiny.GPTJ).init)(jax.random.key(3))
            values[shape] = tiny.to_numpy(params)
            wanted = tiny.model(tiny.GPTJ).abstract_params()
            assert jax.tree.map(lambda a: a.sharding.spec, params) == jax.tree.map(lambda a: a.sharding.spec, wanted)
    for name, value in values[1, 1, 1].items():
        np.testing.assert_allclose(values[2, 2, 2][name], value, rtol=1e-6, atol=1e-9, err_msg=name)


def test_seeds_and_tensors_differ() -> None:
    with jax.set_mesh(tiny.mesh()):
        init = jax.jit(tiny.model(tiny.GPT2).init)
        one, again, two = (tiny.to_numpy(init(jax.random.key(seed))) for seed in (0, 0, 1))
    tiny.assert_same_bits(one, again)
    assert (one["wte_VD"] != two["wte_VD"]).all()
    q = one["blocks/attn/q_DNH"]
    assert (q[0] != q[1]).all(), "layers start alike"
    assert (q != one["blocks/attn/k_DNH"]).all(), "q and k start alike"


def test_parameters_lie_in_slices() -> None:
    """On 1 x 4 x 2 a device holds an eighth of every matrix."""
    with jax.set_mesh(tiny.mesh(1, 4, 2)):
        shapes = tiny.model(tiny.GPT2).abstract_params()
        for name, leaf in trees.leaves_with_names(shapes):
            local = math.prod(leaf.sharding.shard_shape(leaf.shape))
            if len(re.search(r"[A-Z]+$", name)[0]) > 1 and "bias" not in name and name != "wpe_SD":
                assert local * 8 == math.prod(leaf.shape), name


def test_binding_costs_no_operation() -> None:
    with jax.set_mesh(tiny.mesh()):
        model = tiny.model(tiny.GPT2)
        traced = jax.make_jaxpr(lambda p: trees.leaves_with_names(model.bind(p).head().weight_VD)[0][1])(
            model.abstract_params()
        )
    assert not traced.eqns


FITS = GPT2Config(vocab_size=1000, n_layers=2, n_heads=6, d_model=48, d_ff=96, vocab_multiple=8)


@pytest.mark.parametrize(
    ("change", "mesh", "batch", "accumulate", "message"),
    [
        ({}, (1, 1, 4), 8, 1, r"model.n_heads=6 .*mesh.tensor=4.*--mesh.tensor 2"),
        ({"n_heads": 8, "d_ff": 98}, (1, 1, 4), 8, 1, r"model.d_ff=98 .*mesh.tensor=4.*--model.d-ff 100"),
        ({}, (1, 5, 1), 5, 1, r"model.d_model=48 .*mesh.fsdp=5.*--mesh.fsdp 4"),
        ({"vocab_multiple": 6}, (1, 4, 2), 8, 1, r"vocabulary.*1002.*8.*--model.vocab-multiple 24"),
        ({"n_heads": 8, "n_positions": 1023}, (4, 1, 2), 6, 1, r"global_batch=6 .*4.*--global-batch 8"),
        ({}, (2, 1, 1), 8, 3, r"global_batch=8 .*6.*--global-batch 12"),
        ({}, (2, 1, 1), 8, 8, r"global_batch=8 .*16.*--global-batch 16"),
        ({}, (1, 1, 1), 0, 1, r"global_batch=0.*at least 1"),
        ({}, (1, 1, 1), 8, 0, r"accumulate=0.*at least 1"),
    ],
)
def test_what_does_not_divide_is_refused_with_a_number_that_does(
    change: dict[str, int], mesh: tuple[int, int, int], batch: int, accumulate: int, message: str
) -> None:
    config = dataclasses.replace(FITS, **change)
    shape = MeshShape(data=mesh[0], fsdp=mesh[1], tensor=mesh[2])
    with pytest.raises(UserError, match=message):
        check_divisibility(config, shape, batch, accumulate)


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 1, 2), (1, 3, 2)])
@pytest.mark.parametrize("config", tiny.FAMILIES, ids=tiny.name)
def test_the_check_says_what_tracing_would(config: ModelConfig, shape: tuple[int, int, int]) -> None:
    """Where the check passes, the parameters can be laid out; where it refuses, they cannot."""
    mesh = MeshShape(data=shape[0], fsdp=shape[1], tensor=shape[2])
    with jax.set_mesh(tiny.mesh(*shape)):
        try:
            check_divisibility(config, mesh, 24, 1)
        except UserError:
            with pytest.raises(ValueError, match="divi"):
                Model(config=config).abstract_params()
        else:
            Model(config=config).abstract_params()


def test_precision_of_compute_is_the_platforms_by_default() -> None:
    with jax.set_mesh(tiny.mesh()):
        model = Model(config=tiny.GPT2, precision=Precision(params="bfloat16"))
        assert model.bind(model.abstract_params()).dtype == jnp.float32
