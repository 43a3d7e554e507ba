"""GGUF, the file of llama.cpp, by way of the `gguf` package: written one tensor at a time, and read back.

q8_0: every matrix in 8 bits, in blocks of 32. q4_0: the blocks' matrices in 4 bits, the embedding and an untied head in
8. The table of positions, norms and biases stay float32, as llama.cpp's own converter leaves them.

GPT-2 only: llama.cpp knows the name `gptj` but has no implementation of it ("These models don't have usable
implementations", tests of llama.cpp, late 2026).

Source: `convert_hf_to_gguf.py` (class GPT2Model) and `src/models/gpt2.cpp` of llama.cpp.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from meshgpt import trees
from meshgpt.convert.bitsandbytes_write import Contents, check_finite
from meshgpt.convert.gguf_tokenizer import add_tokenizer, check_tokenizer
from meshgpt.convert.hf_names import ModelConfig, Stored, stored_tensors
from meshgpt.convert.hf_read import place
from meshgpt.convert.tensors import Tensors
from meshgpt.data.tokenizer import Tokenizer
from meshgpt.errors import UserError
from meshgpt.models.gpt2 import GPT2Config

GgufKind: TypeAlias = Literal["q8_0", "q4_0"]

_BLOCK = 32
_WHOLE = {
    "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
    "lm_head.weight": "output.weight",
}
_IN_BLOCK = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def gguf_name(tensor: Stored) -> str:
    """llama.cpp's name of a tensor of GPT-2."""
    if tensor.layer is None:
        return _WHOLE[tensor.name]
    module, _, kind = tensor.name.removeprefix(f"transformer.h.{tensor.layer}.").rpartition(".")
    return f"blk.{tensor.layer}.{_IN_BLOCK[module]}.{kind}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufForm:
    """A GGUF file, `model-KIND.gguf`, alone in its folder."""

    kind: GgufKind

    @property
    def marker(self) -> str:
        return f"model-{self.kind}.gguf"

    def check(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        """Raises UserError for what llama.cpp does not load, or where the `gguf` package is missing."""
        _package()
        _check(config, tokenizer, self.kind)

    def nbytes(self, config: ModelConfig) -> int:
        """Bytes of all tensors, nearly."""
        bits = {"F32": 32.0, "Q8_0": 8.5, "Q4_0": 4.5}
        return int(sum(math.prod(t.shape) * bits[_type(t, self.kind)] / 8 for t in stored_tensors(config)))

    def write(
        self,
        contents: Contents,
        config: ModelConfig,
        tokenizer: Tokenizer,
        folder: Path,
        on_progress: Callable[[int, int], None],
    ) -> None:
        """Writes the file, of a model that passed `check`; the host holds one tensor at a time.

        Raises:
          UserError: naming the tensor that holds a value that is not finite.
        """
        _write(contents, config, tokenizer, self.kind, folder / self.marker, on_progress)

    def load(self, folder: Path, config: ModelConfig, abstract: trees.Tree) -> trees.Tree:
        """The parameters, dequantized."""
        return place(open_gguf(folder / self.marker, config), config, abstract)


def _check(config: ModelConfig, tokenizer: Tokenizer, kind: GgufKind) -> None:
    if not isinstance(config, GPT2Config):
        raise UserError(
            f"--format gguf-{kind}: llama.cpp has no GPT-J (it knows the name and no implementation); "
            "nf4, fp4 and int8 are for GPT-J"
        )
    check_tokenizer(tokenizer, f"--format gguf-{kind}")
    for tensor in stored_tensors(config):
        if _type(tensor, kind) != "F32" and _rows(tensor)[1] % _BLOCK:
            raise UserError(
                f"{tensor.name} has rows of {_rows(tensor)[1]} numbers, not a multiple of the block of {kind}, "
                f"{_BLOCK}: int8 is for such a model"
            )


def _write(
    contents: Contents,
    config: ModelConfig,
    tokenizer: Tokenizer,
    kind: GgufKind,
    file: Path,
    on_progress: Callable[[int, int], None],
) -> None:
    gguf = _package()
    assert isinstance(config, GPT2Config), "checked"
    tensors = stored_tensors(config)
    writer = gguf.GGUFWriter(file, "gpt2")
    _add_settings(gguf, writer, config, kind)
    add_tokenizer(gguf, writer, tokenizer, config.vocab_size)
    for tensor in tensors:
        dtype = gguf.GGMLQuantizationType[_type(tensor, kind)]
        shape = gguf.quant_shape_to_byte_shape(_rows(tensor), dtype)
        plain = dtype == gguf.GGMLQuantizationType.F32
        size = int(np.prod(_rows(tensor))) * 4 if plain else int(np.prod(shape))
        written = _rows(tensor) if plain else shape
        writer.add_tensor_info(
            gguf_name(tensor), written, np.dtype(np.float32 if plain else np.uint8), size, raw_dtype=dtype
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, (tensor, found) in enumerate(contents, start=1):
            check_finite(tensor, found)
            rows = (found.T if _is_conv1d(tensor) else found).astype(np.float32)
            dtype = gguf.GGMLQuantizationType[_type(tensor, kind)]
            writer.write_tensor_data(gguf.quantize(np.ascontiguousarray(rows), dtype))
            on_progress(done, len(tensors))
    finally:
        writer.close()


def open_gguf(file: Path, config: ModelConfig) -> Tensors:
    """The tensors of a file that `GgufForm` wrote, dequantized by the `gguf` package one at a time."""
    gguf = _package()
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    entries = {
        tensor.name: _Read(
            shape=tensor.shape, in_out=_is_conv1d(tensor), tensor=found[gguf_name(tensor)], dequantize=gguf.dequantize
        )
        for tensor in stored_tensors(config)
    }
    return Tensors(origin=str(file), entries=entries)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Read:
    shape: tuple[int, ...]
    in_out: bool
    tensor: Any
    dequantize: Callable[[np.ndarray, Any], np.ndarray]

    code = "F32"

    def map(self) -> np.ndarray:
        rows = self.dequantize(self.tensor.data, self.tensor.tensor_type)
        return rows.reshape(self.shape[::-1]).T if self.in_out else rows.reshape(self.shape)


def _is_conv1d(tensor: Stored) -> bool:
    """Whether a tensor of GPT-2 is (in, out), where llama.cpp has (out, in)."""
    return tensor.layer is not None and len(tensor.shape) == 2


def _rows(tensor: Stored) -> tuple[int, ...]:
    return tensor.shape[::-1] if _is_conv1d(tensor) else tensor.shape


def _type(tensor: Stored, kind: GgufKind) -> str:
    if len(tensor.shape) == 1 or tensor.name == "transformer.wpe.weight":
        return "F32"
    return kind.upper() if tensor.layer is not None else "Q8_0"


def _add_settings(gguf: Any, writer: Any, config: GPT2Config, kind: GgufKind) -> None:
    file_types = {"q8_0": gguf.LlamaFileType.MOSTLY_Q8_0, "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0}
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_file_type(file_types[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF needs its package: pip install 'meshgpt[gguf]'") from error
    return gguf
