"""Random architectures against PyTorch: the same logits and gradients once imported, the same bytes once exported."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from hf_peers import MESH, Words, live, our_logits, peer, torch_logits
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from meshgpt import convert, trees
from meshgpt.distributed.mesh import MeshShape
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.gptj import GPTJConfig

MESHES = (MESH, MeshShape(data=8), MeshShape(data=2, fsdp=4))


@st.composite
def architectures(draw):
    """(configuration, mesh): sizes that the mesh divides, and nothing else regular about them."""
    heads, half = draw(st.sampled_from([2, 4, 6])), draw(st.integers(1, 5))
    width = 4 * heads * half  # fsdp=4 divides it
    shared = {
        "vocab_size": draw(st.integers(3, 90)),
        "n_positions": draw(st.integers(2, 20)),
        "n_layers": draw(st.integers(1, 3)),
        "n_heads": heads,
        "d_model": width,
        "d_ff": 4 * draw(st.integers(1, 12)) if draw(st.booleans()) else 0,
        "layer_norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "vocab_multiple": 8,
    }
    mesh = draw(st.sampled_from(MESHES))
    if draw(st.booleans()):
        return GPT2Config(**shared, tied_head=draw(st.booleans())), mesh
    return GPTJConfig(**shared, rotary_dim=2 * draw(st.integers(1, width // heads // 2))), mesh


@pytest.mark.slow
# No shrinking: every example compiles for seconds, and a failing one is small already.
@settings(max_examples=8, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])
@given(architectures())
def test_logits_gradients_and_round_trip_of_random_architectures(tmp_path_factory, case):
    config, mesh = case
    folder = tmp_path_factory.mktemp("random")
    other = peer(config)
    other.save_pretrained(folder)
    live_params, probe = live(config, mesh)
    read = dataclasses.replace(convert.read_config(folder), vocab_multiple=8)
    assert read == dataclasses.replace(config, d_ff=config.mlp_width)
    params = convert.load(folder, read, live_params)
    tokens_BT = probe.tokens_BT[:, : config.n_positions]
    probe = dataclasses.replace(probe, tokens_BT=tokens_BT)
    np.testing.assert_allclose(our_logits(params, probe, config), torch_logits(other, tokens_BT), atol=2e-4, rtol=0)
    _compare_gradients(folder, other, config, params, probe)
    out = folder / "out"
    convert.export(params, read, Words(config.vocab_size, 0), out, probe=probe)
    before, after = (safetensors.torch.load_file(path / "model.safetensors") for path in (folder, out))
    assert before.keys() == after.keys()
    assert all(tensor.equal(after[name]) for name, tensor in before.items())


def _compare_gradients(folder, other, config, params, probe) -> None:
    """Of a random projection of the logits; PyTorch's travel as the parameters do."""
    shape = (*probe.tokens_BT.shape, config.vocab_size)
    weight_BTV = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    logits = other(torch.tensor(probe.tokens_BT, dtype=torch.long)).logits
    (logits * torch.tensor(weight_BTV)).sum().backward()
    gradients = {name: parameter.grad.contiguous() for name, parameter in other.named_parameters()}
    (folder / "gradients").mkdir()
    safetensors.torch.save_file(gradients, folder / "gradients" / "model.safetensors", {"format": "pt"})
    theirs = convert.load(folder / "gradients", config, params)
    padding = [(0, 0), (0, 0), (0, config.padded_vocab - config.vocab_size)]
    ours = _gradients(probe.logits, params, probe.tokens_BT, np.pad(weight_BTV, padding))
    # A bias of the keys changes no attention: its gradient is rounding alone, hence a floor to what is compared.
    floor = 1e-2 * max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(theirs))
    for (name, mine), (_, wanted) in zip(trees.leaves_with_names(ours), trees.leaves_with_names(theirs), strict=True):
        scale = np.abs(wanted).max() + floor
        np.testing.assert_allclose(
            np.asarray(mine) / scale, np.asarray(wanted) / scale, atol=3e-4, rtol=0, err_msg=name
        )


@functools.partial(jax.jit, static_argnums=0)
def _gradients(logits, params, tokens_BT, weight_BTV):
    def projected(params):
        found = logits(params, tokens_BT)
        return jnp.sum(
            jnp.where(jnp.isfinite(found), found, 0.0)
            * jax.sharding.reshard(weight_BTV, jax.typeof(found).sharding.spec)
        )

    return jax.grad(projected)(params)
