"""A model as bitsandbytes quantizes it, in the files that transformers loads: streamed, one matrix at a time.

The matrices of the blocks are quantized; embeddings, heads, norms and biases keep numbers of 16 or 32 bits.

Source: `Params4bit` and `Int8Params` of bitsandbytes 0.50 (what is in the files: see `bnb_read`), and
`BitsAndBytesConfig` of transformers (config.json).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias

import numpy as np

from meshgpt import trees
from meshgpt.convert import safetensor
from meshgpt.convert.bitsandbytes_read import STATE
from meshgpt.convert.hf_config import config_json
from meshgpt.convert.hf_names import ModelConfig, Stored, stored_tensors
from meshgpt.convert.hf_read import load
from meshgpt.convert.hf_write import SHARD_BYTES, Dtype
from meshgpt.convert.json_file import write_json
from meshgpt.convert.tensors import INDEX, SINGLE
from meshgpt.convert.tokenizer import save_files, special_ids
from meshgpt.data.tokenizer import Tokenizer
from meshgpt.errors import UserError
from meshgpt.models import bitsandbytes
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.settings import json_text

Kind: TypeAlias = Literal["nf4", "fp4", "int8"]
Contents: TypeAlias = Iterator[tuple[Stored, np.ndarray]]

_DTYPES = {
    name: safetensor.DTYPES[code] for name, code in (("float32", "F32"), ("bfloat16", "BF16"), ("float16", "F16"))
}
_HEADER_BYTES = 1024  # for the names, dtypes, shapes and ranges of all that one matrix becomes


@dataclasses.dataclass(frozen=True, kw_only=True)
class BnbForm:
    """bitsandbytes' forms, in a folder that transformers loads.

    kind: of the matrices. double_quant: also the scales of 4 bits in 8. dtype: of the rest, and to compute in.
    shard_bytes: a larger model is cut into files of about so many bytes, with an index.
    """

    kind: Kind
    double_quant: bool = False
    dtype: Dtype = "bfloat16"
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        if self.double_quant and self.kind == "int8":
            raise UserError("--double-quant is for nf4 and fp4: int8 has one scale a row and nothing to quantize twice")

    @property
    def marker(self) -> str:
        return "config.json"

    def check(self, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
        """Raises UserError: a matrix whose rows are not a multiple of the block, or a tokenizer of another model."""
        if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size:,} ids and the model {config.vocab_size:,}: "
                "quantize it with the tokenizer that it was trained with"
            )
        for tensor in stored_tensors(config):
            inputs = tensor.part_shape[0]
            if self.kind != "int8" and _is_quantized(tensor) and inputs % bitsandbytes.BLOCK:
                raise UserError(
                    f"{tensor.name} has {inputs} inputs, not a multiple of the block, {bitsandbytes.BLOCK}, which "
                    f"bitsandbytes needs on a CPU: {self.kind} is not for this model; int8 is, which has no blocks"
                )

    def nbytes(self, config: ModelConfig) -> int:
        """Bytes of all tensors, nearly."""
        per_number = {"int8": 1.0}.get(self.kind, 0.5 + (1.02 if self.double_quant else 4) / bitsandbytes.BLOCK)
        wide = _DTYPES[self.dtype].itemsize
        sizes = [(math.prod(t.shape), per_number if _is_quantized(t) else wide) for t in stored_tensors(config)]
        return int(sum(count * each for count, each in sizes))

    def write(
        self,
        contents: Contents,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        folder: Path,
        on_progress: Callable[[int, int], None],
    ) -> None:
        """Writes the folder that `from_pretrained` takes; the host holds one tensor at a time.

        Raises:
          UserError: naming the tensor that holds a value that is not finite, or does once it is in `dtype`.
        """
        count, in_out = len(stored_tensors(config)), isinstance(config, GPT2Config)
        with _Shards(folder, self.shard_bytes, count * _HEADER_BYTES) as files:
            for done, (tensor, found) in enumerate(contents, start=1):
                if _is_quantized(tensor):
                    check_finite(tensor, found)
                    _add_quantized(files, tensor.name, found.T if in_out else found, self)
                else:
                    with np.errstate(over="ignore"):  # told below, by name
                        cast = found.astype(_DTYPES[self.dtype])
                    check_finite(tensor, cast)
                    files.add(tensor.name, cast)
                on_progress(done, count)
        entries = config_json(config, special_ids(tokenizer, config), self.dtype)
        write_json(folder / "config.json", entries | {"quantization_config": self.config_entry()})
        save_files(tokenizer, config, folder)

    def load(self, folder: Path, config: ModelConfig, abstract: trees.Tree) -> trees.Tree:
        """The parameters, those that are quantized as weights of few bits."""
        return load(folder, config, abstract)

    def config_entry(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        four = self.kind != "int8"
        return {
            "_load_in_4bit": four,
            "_load_in_8bit": not four,
            "bnb_4bit_compute_dtype": self.dtype,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": self.kind if four else "fp4",
            "bnb_4bit_use_double_quant": self.double_quant,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": ["lm_head"],
            "llm_int8_threshold": 6.0,
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "quant_method": "bitsandbytes",
        }


def _is_quantized(tensor: Stored) -> bool:
    """Whether a tensor is one that is quantized: a matrix of a block."""
    return tensor.layer is not None and len(tensor.shape) == 2


def check_finite(tensor: Stored, contents: np.ndarray) -> None:
    """Raises UserError, naming the tensor, where a value is not finite."""
    if not np.isfinite(contents).all():
        raise UserError(
            f"{tensor.name} holds a value that is not finite (in {contents.dtype.name}): nothing was written"
        )


def _add_quantized(files: "_Shards", name: str, x_OI: np.ndarray, form: BnbForm) -> None:
    if form.kind == "int8":
        with np.errstate(over="ignore"):  # told here, by name
            codes, largest = bitsandbytes.rows8(x_OI)
        if not np.isfinite(largest).all():
            raise UserError(f"{name} overflows float16, through which int8 goes: take nf4")
        module = name.removesuffix(".weight")
        files.add(name, codes)
        files.add(f"{module}.SCB", largest)
        files.add(f"{module}.weight_format", np.zeros((), np.uint8))  # rows, as they are
        return
    packed, absmax = bitsandbytes.pack4(x_OI, form.kind)
    files.add(name, packed[:, None])
    state: dict[str, Any] = {
        "quant_type": form.kind, "blocksize": bitsandbytes.BLOCK, "dtype": form.dtype, "shape": list(x_OI.shape),
    }  # fmt: skip
    if form.double_quant:
        nested = bitsandbytes.nest(absmax)
        files.add(f"{name}.absmax", nested.codes_K)
        files.add(f"{name}.nested_absmax", nested.absmax)
        files.add(f"{name}.nested_quant_map", bitsandbytes.nested_values())
        state |= {
            "nested_blocksize": bitsandbytes.NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": nested.offset,
        }
    else:
        files.add(f"{name}.absmax", absmax)
    files.add(f"{name}.quant_map", bitsandbytes.values(form.kind))
    files.add(f"{name}.{STATE}{form.kind}", np.frombuffer(json_text(state).encode(), np.uint8))


class _Shards:
    """safetensors files of about `limit` bytes each, numbered and indexed when all of them are there."""

    def __init__(self, folder: Path, limit: int, header_bytes: int) -> None:
        self._folder, self._limit, self._header_bytes = folder, limit, header_bytes
        self._names: list[list[str]] = []
        self._nbytes = 0

    def add(self, name: str, contents: np.ndarray) -> None:
        if self._names[-1] and self._file.nbytes + contents.nbytes > self._limit:
            self._file.__exit__(None, None, None)
            self._open()
        self._file.add(name, contents)
        self._names[-1].append(name)
        self._nbytes += contents.nbytes

    def _open(self) -> None:
        self._file = safetensor.MixedWriter(self._folder / f"{len(self._names)}.partial", self._header_bytes)
        self._names.append([])

    def __enter__(self) -> "_Shards":
        self._open()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.__exit__(kind, error, trace)
        if kind is not None:
            return
        count = len(self._names)
        names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        for number, name in enumerate(names):
            (self._folder / f"{number}.partial").rename(self._folder / name)
        if count > 1:
            where = {tensor: file for file, tensors in zip(names, self._names, strict=True) for tensor in tensors}
            write_json(self._folder / INDEX, {"metadata": {"total_size": self._nbytes}, "weight_map": where})
