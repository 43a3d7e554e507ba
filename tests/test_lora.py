"""Low-rank adapters beside a weight: the product, the sum, the mesh, and PEFT's own on the same numbers."""

import jax
import numpy as np
import pytest
import tiny

from meshgpt import trees
from meshgpt.axes import spec
from meshgpt.layers import Execution
from meshgpt.models import ModelConfig
from meshgpt.trainable import LoRA

ALL = ("attn/*", "mlp/*")


def adapters(config: ModelConfig, part: LoRA) -> dict:
    """Random ones, B too, on the mesh that is set."""
    abstract = tiny.model(config).abstract_params()
    params, _ = part.start({}, abstract, jax.random.key(0))
    rng = np.random.default_rng(1)

    def draw(leaf: jax.Array) -> jax.Array:
        return jax.device_put((rng.normal(size=leaf.shape) * 0.3).astype(np.float32), jax.typeof(leaf).sharding.spec)

    return jax.tree.map(draw, params)


def hidden(config: ModelConfig, execution: Execution, params: trees.Tree) -> np.ndarray:
    tokens = jax.device_put(tiny.tokens(8, 16), spec("batch _"))
    return np.asarray(jax.jit(lambda p: tiny.model(config, execution).bind(p).hidden(tokens))(params))


@pytest.mark.parametrize("execution", [Execution(), Execution(unroll=0), Execution(remat="full")])
@pytest.mark.parametrize("config", tiny.FAMILIES)
def test_joined_computes_what_merged_computes(config: ModelConfig, execution: Execution) -> None:
    part = LoRA(rank=3, alpha=5.0, targets=ALL)
    with jax.set_mesh(tiny.mesh(2, 2, 2)):
        base, low = {"base": tiny.params(config)}, adapters(config, part)
        joined = hidden(config, execution, part.joined(low, base, None))
        merged = part.merged(low, base)
        assert trees.leaves_with_names(merged)[5][1].sharding == trees.leaves_with_names(base["base"])[5][1].sharding
        tiny.assert_close(joined, hidden(config, execution, merged), 1e-4)
        assert np.abs(joined - hidden(config, execution, base["base"])).max() > 0.1
