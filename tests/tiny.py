"""Tiny models, and the way between them and transformers: what the tests of the core share."""

import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from meshgpt import trees
from meshgpt.convert.hf_names import by_path, stored_tensors, to_stored
from meshgpt.distributed.mesh import MeshShape, make_mesh, spec
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.gptj import GPTJConfig
from meshgpt.models.layers import Execution
from meshgpt.models.model import Model, ModelConfig
from meshgpt.models.precision import Precision

if TYPE_CHECKING:
    import transformers

VOCAB = 97
GPT2 = GPT2Config(vocab_size=VOCAB, n_positions=16, n_layers=2, n_heads=8, d_model=16, vocab_multiple=32)
GPTJ = GPTJConfig(vocab_size=VOCAB, n_positions=16, n_layers=2, n_heads=8, d_model=32, rotary_dim=2, vocab_multiple=32)
FAMILIES = [GPT2, GPTJ]
# For what takes shapes alone.
GPT2_124M = GPT2Config(vocab_size=50257, n_positions=1024, n_layers=12, n_heads=12, d_model=768)


def name(config: ModelConfig) -> str:
    return type(config).__name__.removesuffix("Config").lower()


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    """A mesh over the first devices, as many as it takes."""
    return make_mesh(MeshShape(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: math.prod((data, fsdp, tensor))])


def model(config: ModelConfig, execution: Execution = Execution(), precision: Precision = Precision()) -> Model:
    return Model(config=config, execution=execution, precision=precision)


@functools.cache
def numpy_params(config: ModelConfig, scale: float = 0.1) -> dict[str, np.ndarray]:
    """Random parameters by name, biases and norms included, on the host; nothing that starts at zero stays there."""
    with jax.set_mesh(mesh()):
        shapes = model(config).abstract_params()
    rng = np.random.default_rng(0)

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return (rng.normal(size=leaf.shape) * scale + path.endswith("scale_D")).astype(np.float32)

    return {path: draw(path, leaf) for path, leaf in trees.leaves_with_names(shapes)}


def params(config: ModelConfig, values: dict[str, np.ndarray] | None = None) -> trees.Tree:
    """`values` (by default `numpy_params`) as a parameter tree on the mesh that is set."""
    values = numpy_params(config) if values is None else values
    shapes = model(config).abstract_params()
    return trees.map_with_names(lambda path, leaf: jax.device_put(values[path], leaf.sharding.spec), shapes)


def tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Random token ids (rows, length), int32."""
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length), dtype=np.int32)


def batch(rows: np.ndarray, accumulate: int = 1) -> tuple[jax.Array, jax.Array]:
    """Tokens (A, M, T + 1) and weights of 1 (A, M, T) of a step, on the mesh that is set."""
    split = rows.reshape(accumulate, -1, rows.shape[1])
    weights = np.ones((*split.shape[:2], split.shape[2] - 1), np.float32)
    return jax.device_put(split, spec("_ batch _")), jax.device_put(weights, spec("_ batch _"))


def torch_peer(config: ModelConfig, values: dict[str, np.ndarray] | None = None) -> "transformers.PreTrainedModel":
    """The transformers model with the same weights, in eval mode."""
    # Only here, so that the tests that compare with nothing else also run where PyTorch is not installed.
    import torch
    import transformers

    values = numpy_params(config) if values is None else values
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
    }
    if isinstance(config, GPT2Config):
        made = transformers.GPT2Config(
            **settings, tie_word_embeddings=config.tied_head,
            activation_function={"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
            scale_attn_by_inverse_layer_idx=config.inverse_layer_attention,
        )  # fmt: skip
        peer = transformers.GPT2LMHeadModel(made)
    else:
        made = transformers.GPTJConfig(
            **settings, rotary_dim=config.rotary_dim, tie_word_embeddings=config.tied_head
        )  # fmt: skip
        peer = transformers.GPTJForCausalLM(made)
    state = {key: torch.from_numpy(value) for key, value in stored(config, values).items()}
    missing = peer.load_state_dict(state, strict=False).missing_keys
    assert all(key == "lm_head.weight" for key in missing), missing  # tied: it is wte
    peer.tie_weights()
    return peer.eval()


def stored(config: ModelConfig, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters (or their gradients) by our names as Hugging Face's tensors by theirs."""
    return {
        tensor.name: to_stored(
            tensor, [values[path] if tensor.layer is None else values[path][tensor.layer] for path in tensor.paths]
        )
        for tensor in stored_tensors(config)
    }


def paths(config: ModelConfig) -> set[str]:
    """The names of all parameters, by the Hugging Face table."""
    return set(by_path(stored_tensors(config)))


def to_numpy(tree: trees.Tree) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in trees.leaves_with_names(tree)}


def assert_close(ours: np.ndarray, theirs: np.ndarray, relative: float, what: str = "") -> None:
    """|ours - theirs| <= relative * max |theirs|, everywhere."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
    bound = relative * max(float(np.abs(theirs).max()), 1e-30)
    worst = float(np.abs(ours - theirs).max())
    assert worst <= bound, f"{what}: off by {worst:.3g}, more than {relative:g} of {bound / relative:.3g}"


def assert_same_bits(ours: trees.Tree, theirs: trees.Tree) -> None:
    for (path, x), (_, y) in zip(trees.leaves_with_names(ours), trees.leaves_with_names(theirs), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def float32(value: float) -> jax.Array:
    return jnp.asarray(value, jnp.float32)
