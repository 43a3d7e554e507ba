"""What the tests of Hugging Face in and out share: tiny models of transformers and of ours, and their logits."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.torch
import tokenizers
import torch
import transformers
from flax import nnx

from meshgpt import convert, trees
from meshgpt.data.special_tokens import TokenizerFiles
from meshgpt.distributed.mesh import MeshShape, make_mesh
from meshgpt.models.gpt2 import GPT2, GPT2Config
from meshgpt.models.gptj import GPTJ, GPTJConfig
from meshgpt.models.layers import Execution

TOKENS_BT = np.random.default_rng(0).integers(0, 97, (8, 12), dtype=np.int32)
GPT2_TINY = GPT2Config(vocab_size=97, n_positions=16, n_layers=2, n_heads=2, d_model=16, vocab_multiple=8)
GPTJ_TINY = GPTJConfig(
    vocab_size=97, n_positions=16, n_layers=3, n_heads=2, d_model=16, d_ff=24, rotary_dim=4, vocab_multiple=8
)
MESH = MeshShape(data=2, fsdp=2, tensor=2)
ONE = MeshShape(data=8)


class Words:
    """A small tokenizer, as far as an export knows one: the words w0, w1, ... are the ids."""

    def __init__(self, vocab_size: int = 50, eot_id: int = 49):
        self.vocab_size, self.eot_id, self.prefix_id, self.stated = vocab_size, eot_id, eot_id, TokenizerFiles()
        self.decodable = np.ones(vocab_size, np.bool_)
        vocab = {f"w{i}": i for i in range(vocab_size)}
        self.backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
        self.backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids)

    def save(self, folder: Path) -> None:
        self.backend.save(str(folder / "tokenizer.json"))


def peer(config: convert.ModelConfig) -> transformers.PreTrainedModel:
    """A transformers model with random weights, biases and norms included."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": config.vocab_size,
        "n_positions": config.n_positions,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_embd": config.d_model,
        "n_inner": config.mlp_width,
        "layer_norm_epsilon": config.layer_norm_eps,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    if isinstance(config, GPT2Config):
        made = transformers.GPT2Config(
            **settings,
            tie_word_embeddings=config.tied_head,
            activation_function={"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
            scale_attn_by_inverse_layer_idx=config.inverse_layer_attention,
        )
        model = transformers.GPT2LMHeadModel(made)
    else:
        settings |= {"rotary_dim": config.rotary_dim, "tie_word_embeddings": config.tied_head}
        model = transformers.GPTJForCausalLM(transformers.GPTJConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@functools.cache
def _model(config: convert.ModelConfig, mesh: jax.sharding.Mesh, dtype: str) -> tuple[trees.Tree, Callable]:
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


def live(
    config: convert.ModelConfig, mesh: MeshShape = MESH, dtype: str = "float32"
) -> tuple[trees.Tree, convert.Probe]:
    """Random parameters on the mesh and the probe whose logits are our model's."""
    devices = make_mesh(mesh)
    jax.set_mesh(devices)
    abstract, logits = _model(config, devices, dtype)
    rng = np.random.default_rng(1)

    def random(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put((rng.normal(size=leaf.shape) * 0.1).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(random, abstract), convert.Probe(tokens_BT=TOKENS_BT % config.vocab_size, logits=logits)


def torch_logits(model: transformers.PreTrainedModel, tokens_BT: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens_BT, dtype=torch.long)).logits.float().numpy()


def our_logits(params: trees.Tree, probe: convert.Probe, config: convert.ModelConfig) -> np.ndarray:
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


def mtj_shards(model: transformers.PreTrainedModel, shards: int, rng: np.random.Generator) -> list[dict]:
    """The parameters of a GPT-J of transformers as each model shard of Mesh-Transformer-JAX holds them.

    Nested as Haiku names them. Replicated copies that are never used hold noise; what is summed over the shards is cut
    into random parts, on a grid that keeps the sums exact.
    """
    tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}

    def parts(whole: np.ndarray) -> list[np.ndarray]:
        some = [rng.integers(-64, 64, whole.shape).astype(np.float32) / 256 for _ in range(shards - 1)]
        return [*some, whole - np.sum(some, axis=0, dtype=np.float32)] if some else [whole]

    def norm(name: str, shard: int) -> dict[str, np.ndarray]:
        scale, offset = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        noise = rng.normal(size=scale.shape).astype(np.float32)
        return {"scale": scale, "offset": offset} if shard == 0 else {"scale": noise, "offset": noise}

    added = np.arange(model.config.n_embd, dtype=np.float32) / 256
    added_parts = parts(added)
    wte = np.split(tensors["transformer.wte.weight"] - added, shards)
    heads = np.split(tensors["lm_head.weight"].T, shards, axis=1)
    head_biases = np.split(tensors["lm_head.bias"], shards)
    out_biases = [parts(tensors[f"transformer.h.{i}.mlp.fc_out.bias"]) for i in range(model.config.n_layer)]
    root, found = "causal_transformer_shard/~", []
    for s in range(shards):
        tree = {
            f"{root}/embedding_shard/~/linear": {"w": wte[s], "b": added_parts[s]},
            f"{root}/projection_shard/~/linear": {"w": heads[s], "b": head_biases[s]},
            f"{root}/projection_shard/~/replicated_layer_norm": norm("transformer.ln_f", s),
        }
        for i in range(model.config.n_layer):
            block, h = f"{root}/layer_{i}/~", f"transformer.h.{i}"
            # The order in which its modules are made, and so numbered: q, v, k, o, in, out.
            for number, name in enumerate(("attn.q_proj", "attn.v_proj", "attn.k_proj", "attn.out_proj")):
                matrix = tensors[f"{h}.{name}.weight"].T
                module = f"{block}/linear_{number}" if number else f"{block}/linear"
                tree[module] = {"w": np.split(matrix, shards, axis=0 if name == "attn.out_proj" else 1)[s]}
            tree[f"{block}/linear_4"] = {
                "w": np.split(tensors[f"{h}.mlp.fc_in.weight"].T, shards, axis=1)[s],
                "b": np.split(tensors[f"{h}.mlp.fc_in.bias"], shards)[s],
            }
            tree[f"{block}/linear_5"] = {
                "w": np.split(tensors[f"{h}.mlp.fc_out.weight"].T, shards)[s],
                "b": out_biases[i][s],
            }
            tree[f"{block}/replicated_layer_norm"] = norm(f"{h}.ln_1", s)
        found.append(tree)
    return found


def write_mtj(folder: Path, shards: list[dict], step: int, adam: tuple[list[dict], list[dict]] | None = None) -> None:
    """`folder`/shard_S/{0..15}.npz as `write_ckpt` of Mesh-Transformer-JAX makes them; `adam` is (mu, nu) by shard."""
    for s, params in enumerate(shards):
        opt_state: tuple = ()
        if adam is not None:
            count = np.array(step, np.int32)
            # scale, clip_by_global_norm, scale_by_adam, additive_weight_decay, scale, scale_by_schedule
            opt_state = ((), (), (count, adam[0][s], adam[1][s]), (), (), (count,))
        state = {"params": params, "step": np.array(step, np.int32), "opt_state": opt_state}
        leaves = jax.tree.leaves(state)
        (folder / f"shard_{s}").mkdir(parents=True)
        size, more = divmod(len(leaves), 16)
        for i in range(16):
            piece = leaves[i * size + min(i, more) : (i + 1) * size + min(i + 1, more)]
            np.savez(folder / f"shard_{s}" / f"{i}.npz", *piece)


def mtj_logits(shards: list[dict], config: GPTJConfig, tokens_T: np.ndarray) -> np.ndarray:
    """Logits (T, V) in float64 as Mesh-Transformer-JAX computes them, every shard its part and then the sum."""
    N, H, root = config.n_heads // len(shards), config.head_size, "causal_transformer_shard/~"

    def linear(s: int, module: str, x: np.ndarray) -> np.ndarray:
        leaf = shards[s][f"{root}/{module}"]
        return x @ leaf["w"].astype(np.float64) + leaf.get("b", 0.0)

    def norm(module: str, x: np.ndarray) -> np.ndarray:
        leaf = shards[0][f"{root}/{module}/~/replicated_layer_norm"]
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * leaf["scale"] + leaf["offset"]

    def turned(x_TNH: np.ndarray) -> np.ndarray:
        R = config.rotary_dim
        angle = np.arange(len(x_TNH))[:, None] / 10000 ** (np.arange(0, R, 2) / R)
        sin, cos = (np.repeat(f(angle), 2, axis=-1)[:, None] for f in (np.sin, np.cos))
        part = x_TNH[..., :R]
        other = np.stack((-part[..., 1::2], part[..., ::2]), -1).reshape(part.shape)
        return np.concatenate([part * cos + other * sin, x_TNH[..., R:]], -1)

    def attention(s: int, layer: str, x: np.ndarray) -> np.ndarray:
        q, v, k = (linear(s, f"{layer}/~/{m}", x).reshape(-1, N, H) for m in ("linear", "linear_1", "linear_2"))
        scores = np.einsum("tnh,Tnh->ntT", turned(q), turned(k)) / np.sqrt(H)
        scores = np.where(np.tril(np.ones(scores.shape[1:])) > 0, scores, -1e10)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("ntT,Tnh->tnh", scores / scores.sum(-1, keepdims=True), v)
        return linear(s, f"{layer}/~/linear_3", mixed.reshape(len(x), -1))

    def mlp(s: int, layer: str, x: np.ndarray) -> np.ndarray:
        y = linear(s, f"{layer}/~/linear_4", x)
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        return linear(s, f"{layer}/~/linear_5", y)

    everyone, V = range(len(shards)), config.vocab_size // len(shards)
    one_hot = np.eye(config.vocab_size)[tokens_T]
    x = sum(linear(s, "embedding_shard/~/linear", one_hot[:, s * V : (s + 1) * V]) for s in everyone)
    for i in range(config.n_layers):
        h = norm(f"layer_{i}", x)
        x = x + sum(attention(s, f"layer_{i}", h) + mlp(s, f"layer_{i}", h) for s in everyone)
    x = norm("projection_shard", x)
    return np.concatenate([linear(s, "projection_shard/~/linear", x) for s in everyone], -1)
