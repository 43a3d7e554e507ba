"""The name tables: which tensor of a Hugging Face checkpoint holds which of our parameters.

Our parameters are stacked over layers and keep heads apart (`docs/architecture.md`). Hugging Face has one tensor a
layer: GPT-2's as Conv1D (in, out) with q, k and v side by side, GPT-J's as Linear (out, in). `to_stored` and
`from_stored` are the two directions of that one relation, on the slice of one layer.

Source: `GPT2LMHeadModel` and `GPTJForCausalLM` of transformers.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

import numpy as np

from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.gptj import GPTJConfig

ModelConfig = GPT2Config | GPTJConfig

# Constants that old checkpoints carry along: causal masks, the value they mask with, the table of rotary angles.
BUFFERS = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias|embed_positions)")

_WRAPPERS = ("_orig_mod.", "module.")

_STRIP = 16  # columns of a transpose that are copied at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor of a Hugging Face checkpoint.

    `paths` are the parameters it holds: more than one lie side by side along the last axis of the (in, out) matrix.
    `transposed` says that the file has (out, in). `layer` is the slice of our stacked parameters; None is the whole.
    """

    name: str
    shape: tuple[int, ...]
    paths: tuple[str, ...]
    layer: int | None = None
    transposed: bool = False

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of one parameter in this tensor, as an (in, out) matrix or a vector."""
        shape = self.shape[::-1] if self.transposed else self.shape
        return (*shape[:-1], shape[-1] // len(self.paths))


def stored_tensors(config: ModelConfig) -> list[Stored]:
    """Every tensor that a checkpoint of `config` has in the Hugging Face format, in the order of the model."""
    V, D = config.vocab_size, config.d_model
    blocks = _gpt2_block if isinstance(config, GPT2Config) else _gptj_block
    tensors = [Stored(name="transformer.wte.weight", shape=(V, D), paths=("wte_VD",))]
    if isinstance(config, GPT2Config):
        tensors += [Stored(name="transformer.wpe.weight", shape=(config.n_positions, D), paths=("wpe_SD",))]
    for layer in range(config.n_layers):
        tensors += blocks(config, layer)
    tensors += [
        Stored(name="transformer.ln_f.weight", shape=(D,), paths=("ln_f/scale_D",)),
        Stored(name="transformer.ln_f.bias", shape=(D,), paths=("ln_f/bias_D",)),
    ]
    if not config.tied_head:
        tensors += [Stored(name="lm_head.weight", shape=(V, D), paths=("head_VD",))]
    if isinstance(config, GPTJConfig):
        tensors += [Stored(name="lm_head.bias", shape=(V,), paths=("head_bias_V",))]
    return tensors


def _gpt2_block(config: ModelConfig, layer: int) -> list[Stored]:
    D, F = config.d_model, config.mlp_width
    table: list[tuple[str, tuple[int, ...], tuple[str, ...]]] = [
        ("ln_1.weight", (D,), ("ln_1/scale_D",)),
        ("ln_1.bias", (D,), ("ln_1/bias_D",)),
        ("attn.c_attn.weight", (D, 3 * D), ("attn/q_DNH", "attn/k_DNH", "attn/v_DNH")),
        ("attn.c_attn.bias", (3 * D,), ("attn/q_bias_NH", "attn/k_bias_NH", "attn/v_bias_NH")),
        ("attn.c_proj.weight", (D, D), ("attn/o_NHD",)),
        ("attn.c_proj.bias", (D,), ("attn/o_bias_D",)),
        ("ln_2.weight", (D,), ("ln_2/scale_D",)),
        ("ln_2.bias", (D,), ("ln_2/bias_D",)),
        ("mlp.c_fc.weight", (D, F), ("mlp/up_DF",)),
        ("mlp.c_fc.bias", (F,), ("mlp/up_bias_F",)),
        ("mlp.c_proj.weight", (F, D), ("mlp/down_FD",)),
        ("mlp.c_proj.bias", (D,), ("mlp/down_bias_D",)),
    ]
    return [_in_block(layer, name, shape, paths, transposed=False) for name, shape, paths in table]


def _gptj_block(config: ModelConfig, layer: int) -> list[Stored]:
    D, F = config.d_model, config.mlp_width
    table: list[tuple[str, tuple[int, ...], tuple[str, ...]]] = [
        ("ln_1.weight", (D,), ("ln_1/scale_D",)),
        ("ln_1.bias", (D,), ("ln_1/bias_D",)),
        ("attn.k_proj.weight", (D, D), ("attn/k_DNH",)),
        ("attn.v_proj.weight", (D, D), ("attn/v_DNH",)),
        ("attn.q_proj.weight", (D, D), ("attn/q_DNH",)),
        ("attn.out_proj.weight", (D, D), ("attn/o_NHD",)),
        ("mlp.fc_in.weight", (F, D), ("mlp/up_DF",)),
        ("mlp.fc_in.bias", (F,), ("mlp/up_bias_F",)),
        ("mlp.fc_out.weight", (D, F), ("mlp/down_FD",)),
        ("mlp.fc_out.bias", (D,), ("mlp/down_bias_D",)),
    ]
    return [_in_block(layer, name, shape, paths, transposed=len(shape) == 2) for name, shape, paths in table]


def _in_block(layer: int, name: str, shape: tuple[int, ...], paths: tuple[str, ...], *, transposed: bool) -> Stored:
    return Stored(
        name=f"transformer.h.{layer}.{name}",
        shape=shape,
        paths=tuple(f"blocks/{path}" for path in paths),
        layer=layer,
        transposed=transposed,
    )


def by_path(tensors: Iterable[Stored]) -> dict[str, list[Stored]]:
    """The tensors that hold each parameter: one, or one a layer in the order of layers."""
    table: dict[str, list[Stored]] = {}
    for tensor in tensors:
        for path in tensor.paths:
            table.setdefault(path, []).append(tensor)
    return table


def canonical(name: str) -> str:
    """The name as `save_pretrained` writes it; checkpoints of the bare model lack the `transformer.` prefix.

    What torch.compile and DataParallel put before names goes. `model.` is Phi's (see `phi`).
    """
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name if name.startswith(("transformer.", "lm_head.", "model.")) else f"transformer.{name}"


def to_stored(tensor: Stored, parts: Sequence[np.ndarray]) -> np.ndarray:
    """The contents of `tensor` from the layer's slices of the parameters it holds; padding of the vocabulary is cut."""
    matrices = [_without_padding(part, tensor.part_shape) for part in parts]
    whole = matrices[0] if len(matrices) == 1 else np.concatenate(matrices, axis=-1)
    return _copy(whole.T, whole.dtype) if tensor.transposed else np.ascontiguousarray(whole)


def _without_padding(part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if part.ndim == len(shape):  # only these have a vocabulary axis; the others have heads to be merged
        return part[tuple(slice(size) for size in shape)]
    return part.reshape(shape)


def from_stored(
    tensor: Stored, contents: np.ndarray, path: str, shape: tuple[int, ...], index: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
    """The slice `index` of the parameter `path` (of `shape`, one layer of it) out of `contents`, in `dtype`.

    `contents` may be memory-mapped: only the slice is read. Rows that pad the vocabulary are zero.
    """
    matrix = contents.T if tensor.transposed else contents
    start = tensor.paths.index(path) * tensor.part_shape[-1]
    part = matrix[..., start : start + tensor.part_shape[-1]]
    if part.ndim != len(shape):
        return _copy(part.reshape(shape)[index], dtype)
    bounds = [entry.indices(size)[:2] for entry, size in zip(index, shape, strict=True)]
    found = _copy(part[index], dtype)
    missing = [(0, stop - start - size) for (start, stop), size in zip(bounds, found.shape, strict=True)]
    return np.pad(found, missing) if any(after for _, after in missing) else found


def _copy(part: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Always a copy, for JAX may keep what it is given, and the file may go. What overflows `dtype` is infinite."""
    out = np.empty(part.shape, dtype)
    # A transpose goes in strips that stay in the cache: six times as fast as numpy's whole copy. Others go in one.
    width = _STRIP if part.ndim > 1 and part.strides[-1] != part.itemsize else max(1, part.shape[-1])
    with np.errstate(over="ignore"):
        for start in range(0, part.shape[-1], width):
            out[..., start : start + width] = part[..., start : start + width]
    return out
