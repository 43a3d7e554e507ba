"""GGUF, the file of llama.cpp, by way of the `gguf` package: written one tensor at a time, and read back.

f32, f16, bf16: every matrix in that. q8_0: in 8 bits, in blocks of 32. q5_1, q5_0, q4_1 and q4_0: the blocks' matrices
in 5 or 4 bits (the last 1: with a minimum beside the scale), the embedding and an untied head in 8. The table of
positions, norms and biases stay float32, as llama.cpp's own converter leaves them. Of what the package can write, only
forms for weights of -1, 0 and 1 and for experts are left out; what it reads only (q4_k_m, q5_k_m and their kin)
llama.cpp's `llama-quantize` makes of an f16 file.

GPT-J goes by the name of Phi there; `gguf_layout` has llama.cpp's names, and the source.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from meshgpt import trees
from meshgpt.convert import phi
from meshgpt.convert.bitsandbytes_write import Contents, check_finite
from meshgpt.convert.gguf_layout import Written, architecture, as_stored, written, written_tensors
from meshgpt.convert.gguf_tokenizer import add_tokenizer, check_tokenizer
from meshgpt.convert.hf_names import ModelConfig
from meshgpt.convert.hf_read import place
from meshgpt.convert.tensors import Tensors
from meshgpt.data.tokenizer import Tokenizer
from meshgpt.errors import UserError
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.gptj import GPTJConfig

GgufKind: TypeAlias = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]

MODELFILE = "Modelfile"  # for Ollama

_BLOCK = 32
_BITS = {"F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.5, "Q5_1": 6.0, "Q5_0": 5.5, "Q4_1": 5.0, "Q4_0": 4.5}
# How many times the largest number of float16 fits: a block's scale or minimum is kept in it.
_STEPS = {"F16": 1, "Q8_0": 127, "Q5_1": 1, "Q5_0": 16, "Q4_1": 1, "Q4_0": 8}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufForm:
    """A GGUF file, `model-KIND.gguf`, and a `Modelfile` that gives it to Ollama."""

    kind: GgufKind

    @property
    def marker(self) -> str:
        return f"model-{self.kind}.gguf"

    def check(self, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
        """Raises UserError for what llama.cpp does not load, or where the `gguf` package is missing."""
        _package()
        _check(config, tokenizer, self.kind)

    def nbytes(self, config: ModelConfig) -> int:
        """Bytes of all tensors, nearly."""
        return int(sum(math.prod(t.shape) * _BITS[_type(t, self.kind)] / 8 for t in written_tensors(config)))

    def note(self, config: ModelConfig) -> str:
        """What whoever gets the file should know, if anything."""
        return phi.NOTE if isinstance(config, GPTJConfig) else ""

    def write(
        self,
        contents: Contents,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        folder: Path,
        on_progress: Callable[[int, int], None],
    ) -> None:
        """Writes the file, of a model that passed `check`; the host holds one tensor at a time.

        Raises:
          UserError: naming the tensor that holds a value that is not finite, or too large for this form.
        """
        assert tokenizer is not None, "checked"
        _write(contents, config, tokenizer, self.kind, folder / self.marker, on_progress)
        (folder / MODELFILE).write_text(f"FROM ./{self.marker}\nPARAMETER num_ctx {config.n_positions}\n", "utf-8")

    def load(self, folder: Path, config: ModelConfig, abstract: trees.Tree) -> trees.Tree:
        """The parameters, dequantized."""
        return place(open_gguf(folder / self.marker, config), config, abstract)


def _check(config: ModelConfig, tokenizer: Tokenizer | None, kind: GgufKind) -> None:
    if tokenizer is None:
        raise UserError(
            f"--format gguf-{kind}: llama.cpp takes the tokenizer from the file, and there is none: copy the model's "
            "tokenizer.json to it; nf4, fp4 and int8 go without"
        )
    check_tokenizer(tokenizer, f"--format gguf-{kind}")
    if isinstance(config, GPT2Config) and (config.activation != "gelu_tanh" or config.inverse_layer_attention):
        raise UserError(
            f"--format gguf-{kind}: llama.cpp's GPT-2 has GELU's tanh form and one scale of attention, and this has "
            f"activation={config.activation}, inverse_layer_attention={config.inverse_layer_attention}: nf4, fp4 and "
            "int8 are for such a model"
        )
    for tensor in written_tensors(config):
        if _type(tensor, kind).startswith("Q") and tensor.shape[1] % _BLOCK:
            raise UserError(
                f"{tensor.stored.name} has rows of {tensor.shape[1]} numbers, not a multiple of the block of {kind}, "
                f"{_BLOCK}: gguf-f16 and int8 are for such a model"
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
    tensors = written_tensors(config)
    writer = gguf.GGUFWriter(file, architecture(config))
    _add_settings(gguf, writer, config, kind)
    add_tokenizer(gguf, writer, tokenizer, config.vocab_size)
    for tensor in tensors:
        dtype = gguf.GGMLQuantizationType[_type(tensor, kind)]
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, dtype)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=dtype)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        arrays = written(_finite(contents), config)
        for done, (tensor, rows) in enumerate(zip(tensors, arrays, strict=True), start=1):
            dtype = gguf.GGMLQuantizationType[_type(tensor, kind)]
            _check_range(tensor, rows, dtype.name)
            writer.write_tensor_data(gguf.quantize(np.ascontiguousarray(rows), dtype))
            on_progress(done, len(tensors))
    finally:
        writer.close()


def _finite(contents: Contents) -> Contents:
    for tensor, found in contents:
        check_finite(tensor, found)
        yield tensor, found


def _check_range(tensor: Written, rows: np.ndarray, kind: str) -> None:
    largest, limit = float(np.abs(rows).max()), float(np.finfo(np.float16).max) * _STEPS.get(kind, math.inf)
    if largest > limit:
        raise UserError(
            f"{tensor.stored.name} reaches {largest:.4g}, and {kind.lower()}, whose scales are float16, holds "
            f"{limit:.4g} at most: gguf-bf16 is for such a model"
        )


def open_gguf(file: Path, config: ModelConfig) -> Tensors:
    """The tensors of a file that `GgufForm` wrote, dequantized by the `gguf` package one at a time."""
    gguf = _package()
    found = {t.name: _Read(tensor=t, dequantize=gguf.dequantize) for t in gguf.GGUFReader(file).tensors}
    return as_stored(found, config, str(file))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Read:
    """A tensor of the file, rows first as NumPy has it."""

    tensor: Any
    dequantize: Callable[[np.ndarray, Any], np.ndarray]

    code = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape.tolist()[::-1])

    def map(self) -> np.ndarray:
        return self.dequantize(self.tensor.data, self.tensor.tensor_type).reshape(self.shape)


def _type(tensor: Written, kind: GgufKind) -> str:
    if tensor.kept_float32:
        return "F32"
    return kind.upper() if tensor.in_block or not kind.startswith("q") else "Q8_0"


def _add_settings(gguf: Any, writer: Any, config: ModelConfig, kind: GgufKind) -> None:
    file_type = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    if isinstance(config, GPTJConfig):
        writer.add_head_count_kv(config.n_heads)
        writer.add_rope_dimension_count(config.rotary_dim)
        writer.add_rope_freq_base(10000.0)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF needs its package: pip install 'meshgpt[gguf]'") from error
    return gguf
