"""`config.json` to our configurations and back.

Source: `GPT2Config`, `GPTJConfig` and `PhiConfig` of transformers, whose defaults hold for what a file leaves out.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshgpt.convert.hf_names import ModelConfig
from meshgpt.errors import UserError
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.gptj import GPTJConfig
from meshgpt.models.layers import Activation

# Ours by theirs; the first of each of ours is what is written.
_ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_GELU_TANH = tuple(name for name, ours in _ACTIVATIONS.items() if ours == "gelu_tanh")
# transformers takes either name of these.
_ALIASES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Fields:
    """The entries of one config.json, by type; every mistake names the file, the field and its value."""

    file: Path
    entries: dict[str, Any]

    def whole(self, name: str, default: int) -> int:
        other = _ALIASES.get(name, name)
        if other in self.entries:
            if self.entries.get(name, self.entries[other]) != self.entries[other]:
                raise UserError(
                    f"{self.file}: {name} is {self.entries[name]!r} and {other}, another name of it, "
                    f"{self.entries[other]!r}; take the wrong one out"
                )
            name = other
        value = self.entries.get(name, default)
        if type(value) is not int:
            raise UserError(f"{self.file}: {name} is {value!r}; a whole number is needed")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.entries.get(name, default)
        if type(value) not in (int, float):
            raise UserError(f"{self.file}: {name} is {value!r}; a number is needed")
        return float(value)

    def refuse_unless(self, name: str, default: Any, accepted: tuple[Any, ...]) -> None:
        value = self.entries.get(name, default)
        if value not in accepted:
            raise UserError(f"{self.file}: {name} is {value!r}; supported: {', '.join(map(repr, accepted))}")


def read_config(folder: Path) -> ModelConfig:
    """The architecture that `folder`/config.json describes; the vocabulary is padded to our usual multiple.

    Raises:
      UserError: no or a broken config.json, another architecture, or a variant of GPT-2 or GPT-J that computes
        something else.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} is not a Hugging Face model: it has no config.json")
    try:
        entries = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise UserError(f"{file} is not a table of settings")
    fields = _Fields(file=file, entries=entries)
    fields.refuse_unless("model_type", None, ("gpt2", "gptj", "phi"))
    if entries["model_type"] == "phi":
        return _phi(fields)
    known = tuple(_ACTIVATIONS) if entries["model_type"] == "gpt2" else _GELU_TANH
    fields.refuse_unless("activation_function", "gelu_new", known)
    _check_quantization(fields)
    return _gpt2(fields) if entries["model_type"] == "gpt2" else _gptj(fields)


def _method(entry: Any) -> str:
    if not isinstance(entry, dict):
        return repr(entry)
    older = "load_in_4bit" in entry or "load_in_8bit" in entry  # such files do not name the method
    return str(entry.get("quant_method", "bitsandbytes" if older else "?"))


def _check_quantization(fields: _Fields) -> None:
    entry = fields.entries.get("quantization_config")
    if entry is not None and _method(entry) != "bitsandbytes":
        raise UserError(
            f"{fields.file}: quantization_config is {_method(entry)}'s; supported: bitsandbytes. Take the model that "
            "it was made from"
        )


def _gpt2(fields: _Fields) -> GPT2Config:
    fields.refuse_unless("scale_attn_weights", True, (True,))
    fields.refuse_unless("scale_attn_by_inverse_layer_idx", False, (False, True))
    fields.refuse_unless("add_cross_attention", False, (False,))
    fields.refuse_unless("tie_word_embeddings", True, (True, False))
    width = fields.whole("n_embd", 768)
    return GPT2Config(
        vocab_size=fields.whole("vocab_size", 50257),
        n_positions=fields.whole("n_positions", 1024),
        n_layers=fields.whole("n_layer", 12),
        n_heads=fields.whole("n_head", 12),
        d_model=width,
        d_ff=_inner(fields, width),
        layer_norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        tied_head=fields.entries.get("tie_word_embeddings", True),
        embd_dropout=fields.number("embd_pdrop", 0.1),
        attn_dropout=fields.number("attn_pdrop", 0.1),
        resid_dropout=fields.number("resid_pdrop", 0.1),
        activation=_ACTIVATIONS[fields.entries.get("activation_function", "gelu_new")],
        inverse_layer_attention=fields.entries.get("scale_attn_by_inverse_layer_idx", False),
    )


def _gptj(fields: _Fields) -> GPTJConfig:
    fields.refuse_unless("tie_word_embeddings", False, (False, True))
    width, heads = fields.whole("n_embd", 4096), fields.whole("n_head", 16)
    turned = fields.entries.get("rotary_dim", 64)
    return GPTJConfig(
        vocab_size=fields.whole("vocab_size", 50400),
        n_positions=fields.whole("n_positions", 2048),
        n_layers=fields.whole("n_layer", 28),
        n_heads=heads,
        d_model=width,
        d_ff=_inner(fields, width),
        layer_norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        rotary_dim=fields.whole("rotary_dim", 64) if turned is not None else width // max(heads, 1),
        tied_head=fields.entries.get("tie_word_embeddings", False),
    )


def _phi(fields: _Fields) -> GPTJConfig:
    """The GPT-J that a Phi may be; whether it is one, its biases say (`phi.as_gptj`)."""
    heads, width = fields.whole("num_attention_heads", 32), fields.whole("hidden_size", 2048)
    if fields.entries.get("quantization_config") is not None:
        raise UserError(f"{fields.file}: a quantized Phi is not read; take the model that it was made from")
    fields.refuse_unless("qk_layernorm", False, (False,))
    fields.refuse_unless("num_key_value_heads", None, (None, heads))
    fields.refuse_unless("hidden_act", "gelu_new", _GELU_TANH)
    fields.refuse_unless("tie_word_embeddings", False, (False, True))
    newer = fields.entries.get("rope_parameters") or {}
    if not isinstance(newer, dict):
        raise UserError(f"{fields.file}: rope_parameters is {newer!r}; a table is needed")
    rope = _Fields(file=fields.file, entries=fields.entries | newer)
    rope.refuse_unless("rope_scaling", None, (None,))
    rope.refuse_unless("rope_type", "default", ("default",))
    rope.refuse_unless("rope_theta", 10000.0, (10000.0,))
    return GPTJConfig(
        vocab_size=fields.whole("vocab_size", 51200),
        n_positions=fields.whole("max_position_embeddings", 2048),
        n_layers=fields.whole("num_hidden_layers", 24),
        n_heads=heads,
        d_model=width,
        d_ff=fields.whole("intermediate_size", 8192),
        layer_norm_eps=fields.number("layer_norm_eps", 1e-5),
        rotary_dim=int(width // max(heads, 1) * rope.number("partial_rotary_factor", 0.5)),
        tied_head=fields.entries.get("tie_word_embeddings", False),
    )


def _inner(fields: _Fields, width: int) -> int:
    return 4 * width if fields.entries.get("n_inner") is None else fields.whole("n_inner", 0)


def config_json(config: ModelConfig, special_ids: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The entries of config.json for a model in `dtype`. special_ids: `bos_token_id`, `eos_token_id` and the like."""
    shared = {
        **special_ids,
        "initializer_range": 0.02,
        "layer_norm_epsilon": config.layer_norm_eps,
        "n_ctx": config.n_positions,  # for llama.cpp's converter
        "n_embd": config.d_model,
        "n_head": config.n_heads,
        "n_inner": config.mlp_width,
        "n_layer": config.n_layers,
        "n_positions": config.n_positions,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if isinstance(config, GPT2Config):
        return shared | {
            "activation_function": next(name for name, ours in _ACTIVATIONS.items() if ours == config.activation),
            "add_cross_attention": False,
            "architectures": ["GPT2LMHeadModel"],
            "attn_pdrop": config.attn_dropout,
            "embd_pdrop": config.embd_dropout,
            "model_type": "gpt2",
            "reorder_and_upcast_attn": False,
            "resid_pdrop": config.resid_dropout,
            "scale_attn_by_inverse_layer_idx": config.inverse_layer_attention,
            "scale_attn_weights": True,
            "tie_word_embeddings": config.tied_head,
        }
    return shared | {
        "activation_function": "gelu_new",
        "architectures": ["GPTJForCausalLM"],
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "model_type": "gptj",
        "resid_pdrop": 0.0,
        "rotary": True,
        "rotary_dim": config.rotary_dim,
        "tie_word_embeddings": config.tied_head,
    }
