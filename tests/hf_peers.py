"""What the tests of Hugging Face in and out share: tiny models of transformers and of ours, and their logits."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.torch
import torch
import transformers
from flax import nnx

from meshgpt import hf, trees
from meshgpt.axes import MeshShape, make_mesh
from meshgpt.gpt2 import GPT2, GPT2Config
from meshgpt.gptj import GPTJ, GPTJConfig
from meshgpt.layers import Execution

TOKENS_BT = np.random.default_rng(0).integers(0, 97, (8, 12), dtype=np.int32)
GPT2_TINY = GPT2Config(vocab_size=97, n_positions=16, n_layers=2, n_heads=2, d_model=16, vocab_multiple=8)
GPTJ_TINY = GPTJConfig(
    vocab_size=97, n_positions=16, n_layers=3, n_heads=2, d_model=16, d_ff=24, rotary_dim=4, vocab_multiple=8
)
MESH = MeshShape(data=2, fsdp=2, tensor=2)
ONE = MeshShape(data=8)


class Words:
    """A tokenizer as far as an export knows one."""

    vocab_size = 50
    eot_id = 49

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def peer(config: hf.ModelConfig) -> transformers.PreTrainedModel:
    """A transformers model with random weights, biases and norms included."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": config.vocab_size,
        "n_positions": config.n_positions,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_embd": config.d_model,
        "n_inner": config.mlp_width,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    if isinstance(config, GPT2Config):
        made = transformers.GPT2Config(**settings, tie_word_embeddings=config.tied_head)
        model = transformers.GPT2LMHeadModel(made)
    else:
        model = transformers.GPTJForCausalLM(transformers.GPTJConfig(**settings, rotary_dim=config.rotary_dim))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@functools.cache
def _model(config: hf.ModelConfig, mesh: jax.sharding.Mesh, dtype: str) -> tuple[trees.Tree, Callable]:
    """(abstract parameters, the jitted logits of (params, tokens_BT)); `mesh` is the one that is set."""
    kind = GPT2 if isinstance(config, GPT2Config) else GPTJ
    made = nnx.eval_shape(lambda: kind(config, Execution(), params_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
    graph, state = nnx.split(made)

    @jax.jit
    def logits(params: trees.Tree, tokens_BT: jax.Array) -> jax.Array:
        values = nnx.clone(state)
        nnx.replace_by_pure_dict(values, params)
        model = nnx.merge(graph, values)
        return model.logits(model.hidden(tokens_BT))

    def on_devices(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = jax.sharding.NamedSharding(mesh, leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(on_devices, nnx.to_pure_dict(state)), logits


def live(config: hf.ModelConfig, mesh: MeshShape = MESH, dtype: str = "float32") -> tuple[trees.Tree, hf.Probe]:
    """Random parameters on the mesh and the probe whose logits are our model's."""
    devices = make_mesh(mesh)
    jax.set_mesh(devices)
    abstract, logits = _model(config, devices, dtype)
    rng = np.random.default_rng(1)

    def random(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put((rng.normal(size=leaf.shape) * 0.1).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(random, abstract), hf.Probe(tokens_BT=TOKENS_BT % config.vocab_size, logits=logits)


def torch_logits(model: transformers.PreTrainedModel, tokens_BT: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens_BT, dtype=torch.long)).logits.float().numpy()


def our_logits(params: trees.Tree, probe: hf.Probe, config: hf.ModelConfig) -> np.ndarray:
    return np.asarray(probe.logits(params, probe.tokens_BT))[..., : config.vocab_size]


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Passes the tensors in `folder` through `change` and writes them again."""
    file = folder / "model.safetensors"
    changed = {name: tensor.contiguous() for name, tensor in change(safetensors.torch.load_file(file)).items()}
    safetensors.torch.save_file(changed, file, {"format": "pt"})


def assert_equal_trees(a: trees.Tree, b: trees.Tree) -> None:
    for (name, x), (_, y) in zip(trees.leaves_with_names(a), trees.leaves_with_names(b), strict=True):
        assert x.dtype == y.dtype, name
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32), name)
