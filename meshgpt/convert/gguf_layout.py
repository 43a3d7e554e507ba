"""What llama.cpp calls the tensors of GPT-2 and GPT-J, and how they lie in its files.

llama.cpp knows the name `gptj` but has no implementation of it ("These models don't have usable implementations", tests
of llama.cpp, late 2026). GPT-J is written as the Phi that it is (`phi`), architecture `phi2`.

Source: `convert_hf_to_gguf.py` (classes GPT2Model and Phi2Model), `src/models/gpt2.cpp` and `phi2.cpp` of llama.cpp.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from meshgpt.convert import hf_names, phi
from meshgpt.convert.bitsandbytes_write import Contents
from meshgpt.convert.hf_names import ModelConfig, Stored
from meshgpt.convert.tensors import Entry, Tensors
from meshgpt.models.gptj import GPTJConfig

POSITIONS = "position_embd.weight"

_WHOLE = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "model.embed_tokens": "token_embd",
    "model.final_layernorm": "output_norm",
    "lm_head": "output",
}
_IN_BLOCK = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "self_attn.dense": "attn_output",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # one above the other, as `attn_qkv`


class Place(NamedTuple):
    """Where a stored tensor lies: rows number `part` of `parts` equal ones of llama.cpp's tensor `name`."""

    name: str
    part: int = 0
    parts: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """A tensor of the file. shape: rows and their length. stored: one of those it is made of, for messages."""

    name: str
    shape: tuple[int, ...]
    stored: Stored

    @property
    def kept_float32(self) -> bool:
        """Norms, biases and the table of positions, which llama.cpp's own converter leaves so too."""
        return len(self.shape) == 1 or self.name == POSITIONS

    @property
    def in_block(self) -> bool:
        return self.stored.layer is not None


def architecture(config: ModelConfig) -> str:
    """llama.cpp's name of the architecture."""
    return "phi2" if isinstance(config, GPTJConfig) else "gpt2"


def place_of(tensor: Stored) -> Place:
    """Where a tensor of GPT-2 or Phi lies."""
    module, _, kind = tensor.name.rpartition(".")
    if tensor.layer is None:
        return Place(f"{_WHOLE[module]}.{kind}")
    module = module.split(f".{tensor.layer}.", 1)[1]
    if module in _FUSED:
        return Place(f"blk.{tensor.layer}.attn_qkv.{kind}", _FUSED.index(module), len(_FUSED))
    return Place(f"blk.{tensor.layer}.{_IN_BLOCK[module]}.{kind}")


def written_tensors(config: ModelConfig) -> list[Written]:
    """Every tensor of the file, in the order of `written`."""
    last: dict[str, Written] = {}
    for tensor in _tensors(config):
        place, rows = place_of(tensor), _rows(tensor)
        last.pop(place.name, None)  # its place is that of the last of its parts
        last[place.name] = Written(name=place.name, shape=(rows[0] * place.parts, *rows[1:]), stored=tensor)
    return list(last.values())


def written(contents: Contents, config: ModelConfig) -> Iterator[np.ndarray]:
    """What each of `written_tensors` holds, float32; the host has one of them at a time, and what it is made of."""
    found = phi.contents(_with_head(contents, config), _untied(config)) if isinstance(config, GPTJConfig) else contents
    parts: dict[str, dict[int, np.ndarray]] = {}
    for tensor, array in found:
        place = place_of(tensor)
        held = parts.setdefault(place.name, {})
        held[place.part] = (array.T if _is_conv1d(tensor) else array).astype(np.float32)
        if len(held) == place.parts:
            del parts[place.name]
            yield held[0] if place.parts == 1 else np.concatenate([held[part] for part in range(place.parts)])


def as_stored(found: Mapping[str, Entry], config: ModelConfig, origin: str) -> Tensors:
    """The model's own tensors out of those of a file, by llama.cpp's names; cut and turned when they are read."""
    entries = {
        tensor.name: _Part(whole=found[place_of(tensor).name], tensor=tensor, place=place_of(tensor))
        for tensor in _tensors(config)
    }
    tensors = Tensors(origin=origin, entries=entries)
    return phi.as_gptj(tensors, _untied(config)) if isinstance(config, GPTJConfig) else tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    whole: Entry
    tensor: Stored
    place: Place

    code = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def map(self) -> np.ndarray:
        rows = _rows(self.tensor)
        start = self.place.part * rows[0]
        part = self.whole.map()[start : start + rows[0]]
        return part.T if _is_conv1d(self.tensor) else part


def _tensors(config: ModelConfig) -> list[Stored]:
    """The tensors that the names here are of."""
    if isinstance(config, GPTJConfig):
        return phi.stored_tensors(_untied(config))
    return hf_names.stored_tensors(config)


def _untied(config: GPTJConfig) -> GPTJConfig:
    """With a head of its own: llama.cpp's Phi has no other."""
    return dataclasses.replace(config, tied_head=False)


def _with_head(contents: Contents, config: GPTJConfig) -> Contents:
    """The tensors of `_untied` from those of `config`: a tied head is a copy of the embedding."""
    by_name = {tensor.name: tensor for tensor in hf_names.stored_tensors(_untied(config))}
    table = np.empty(0)
    for tensor, array in contents:
        if tensor.name == "transformer.wte.weight" and config.tied_head:
            table = array
        if tensor.name == "lm_head.bias" and config.tied_head:
            yield by_name["lm_head.weight"], table
        yield tensor, array


def _is_conv1d(tensor: Stored) -> bool:
    """Whether a tensor is (in, out), as GPT-2 has it, where llama.cpp has (out, in)."""
    return tensor.layer is not None and len(tensor.shape) == 2 and not tensor.transposed


def _rows(tensor: Stored) -> tuple[int, ...]:
    return tensor.shape[::-1] if _is_conv1d(tensor) else tensor.shape
