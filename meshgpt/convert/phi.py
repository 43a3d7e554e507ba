"""GPT-J under the name of Phi, which vLLM, llama.cpp and others know: the same function, its numbers in other places.

Both have one norm a block, attention and MLP side by side and a head with a bias. Phi has biases of q, k, v and the
attention's output besides, which are zero here; and its rotary embedding turns dimension i of the first R of a head
against i + R/2, where GPT-J's turns 2i against 2i + 1: the rows of q and k within a head go in the order
0, 2, 4, ..., 1, 3, 5, ..., and all their products are what they were.

Source: `PhiForCausalLM` of transformers.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from meshgpt.convert import hf_names
from meshgpt.convert.hf_names import Stored
from meshgpt.convert.tensors import Entry, Tensors
from meshgpt.errors import UserError
from meshgpt.models.gptj import GPTJConfig

NOTE = (
    "this is GPT-J under the name of Phi, the same model: rows of q and k are reordered for Phi's rotary embedding, "
    "and the attention's biases, which GPT-J has not, are zero"
)

_WHOLE = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.final_layernorm",
    "lm_head": "lm_head",
}
_IN_BLOCK = {
    "ln_1": "input_layernorm",
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.out_proj": "self_attn.dense",
    "mlp.fc_in": "mlp.fc1",
    "mlp.fc_out": "mlp.fc2",
}


def stored_tensors(config: GPTJConfig) -> list[Stored]:
    """Every tensor of the Phi that `config` is. Those with no `paths` are the biases, zero, that GPT-J has not."""
    return [one for tensor in hf_names.stored_tensors(config) for one in _renamed(tensor)]


def _renamed(tensor: Stored) -> list[Stored]:
    """The tensor under Phi's name, and the bias that comes with it, if GPT-J has none there."""
    module, _, kind = tensor.name.rpartition(".")
    if tensor.layer is None:
        return [dataclasses.replace(tensor, name=f"{_WHOLE[module]}.{kind}")]
    kept = module.removeprefix(f"transformer.h.{tensor.layer}.")
    module = f"model.layers.{tensor.layer}.{_IN_BLOCK[kept]}"
    here = dataclasses.replace(tensor, name=f"{module}.{kind}")
    bias = Stored(name=f"{module}.bias", shape=tensor.shape[:1], paths=(), layer=tensor.layer)
    return [here, bias] if kept.startswith("attn.") else [here]


def contents(found: Iterator[tuple[Stored, np.ndarray]], config: GPTJConfig) -> Iterator[tuple[Stored, np.ndarray]]:
    """The tensors of `stored_tensors` with what they hold, from GPT-J's tensors in the order of the model."""
    order = _order(config)
    for tensor, array in found:
        here, *biases = _renamed(tensor)
        yield here, array[order] if _turns(tensor) else array
        for bias in biases:
            yield bias, np.zeros(bias.shape, array.dtype)


def is_phi(tensors: Tensors) -> bool:
    """Whether tensors have Phi's names."""
    return any(name.startswith("model.") for name in tensors.entries)


def as_gptj(tensors: Tensors, config: GPTJConfig) -> Tensors:
    """The tensors of a Phi (all of `stored_tensors`, no others) as those of GPT-J, reordered when they are read.

    Raises:
      UserError: a bias of the attention is not zero: it is a Phi proper.
    """
    inverse, entries = np.argsort(_order(config)), {}
    for tensor in hf_names.stored_tensors(config):
        here, *biases = _renamed(tensor)
        for bias in biases:
            _check_zero(tensors, bias.name)
        entry = tensors.entries[here.name]
        entries[tensor.name] = _Reordered(stored=entry, order=inverse) if _turns(tensor) else entry
    return Tensors(origin=tensors.origin, entries=entries)


def _check_zero(tensors: Tensors, name: str) -> None:
    largest = np.abs(tensors.entries[name].map().astype(np.float32)).max()
    if not largest == 0:
        raise UserError(
            f"{tensors.origin}: {name} reaches {largest:.4g}. Of Phi's models only GPT-J written as Phi is read "
            "(meshgpt export --as phi), which has zeros there; a Phi proper is another architecture: name a GPT-2 or a "
            "GPT-J"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reordered:
    """A stored tensor whose rows are put into another order when it is read."""

    stored: Entry
    order: np.ndarray

    @property
    def code(self) -> str:
        return self.stored.code

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def map(self) -> np.ndarray:
        return self.stored.map()[self.order]


def _turns(tensor: Stored) -> bool:
    return tensor.paths[0].endswith(("/q_DNH", "/k_DNH"))


def _order(config: GPTJConfig) -> np.ndarray:
    """Which of GPT-J's rows of q or k each row of Phi's is, (D,)."""
    turned = np.arange(config.rotary_dim)
    within_H = np.concatenate([turned[::2], turned[1::2], np.arange(config.rotary_dim, config.head_size)])
    return (np.arange(config.n_heads)[:, None] * config.head_size + within_H[None]).reshape(-1)


def rotary_share(config: GPTJConfig) -> float:
    """`partial_rotary_factor`: programs take whole numbers of it, of the head's size or of the model's width."""
    share = config.rotary_dim / config.head_size
    while int(config.head_size * share) < config.rotary_dim or int(config.d_model * share) < (
        config.rotary_dim * config.n_heads
    ):
        share = math.nextafter(share, 2.0)
    return share


def config_json(config: GPTJConfig, special_ids: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The entries of config.json of the Phi that `config` is; arguments as of `hf_config.config_json`."""
    return {
        "architectures": ["PhiForCausalLM"],
        "attention_dropout": 0.0,
        **special_ids,
        "embd_pdrop": 0.0,
        "hidden_act": "gelu_new",
        "hidden_size": config.d_model,
        "initializer_range": 0.02,
        "intermediate_size": config.mlp_width,
        "layer_norm_eps": config.layer_norm_eps,
        "max_position_embeddings": config.n_positions,
        "model_type": "phi",
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.n_heads,
        "partial_rotary_factor": rotary_share(config),
        "qk_layernorm": False,
        "resid_pdrop": 0.0,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": config.tied_head,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
