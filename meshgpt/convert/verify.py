"""The export gate: a folder is reopened from disk and compared with the live model."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from meshgpt import trees
from meshgpt.convert import phi, safetensor
from meshgpt.convert.gather import live_tensors
from meshgpt.convert.hf_config import ModelConfig, read_config
from meshgpt.convert.hf_names import stored_tensors
from meshgpt.convert.hf_read import fitting, load
from meshgpt.convert.tensors import Tensors, open_tensors
from meshgpt.errors import UserError
from meshgpt.models.gptj import GPTJConfig

# Of the spread of the live logits. Equal parameters give equal logits, but for a kernel that is not deterministic;
# parameters rounded to 16 bits move them by a few percent; one misplaced tensor moves them by their whole spread.
_EXACT, _ROUNDED = 1e-5, 0.1

PROBE_COMPILER_OPTIONS = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
"""For `jax.jit` of a probe's logits: XLA moves the cast of 16-bit parameters out of the scan over layers, and so holds
all of them in float32 at once (GPT-2 XL: 5.8 GiB more on a CPU)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """What the logits are compared on.

    tokens_BT: real text, int32.
    logits: (params, tokens_BT) to logits_BTV, as the live model computes them; the padded vocabulary may be included.
      Compile it with `PROBE_COMPILER_OPTIONS`.
    """

    tokens_BT: np.ndarray
    logits: Callable[[trees.Tree, np.ndarray], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """A passed comparison.

    parameters: their number, padding of the vocabulary left out.
    logit_error: root mean square of the difference of the logits over their spread; 0 for equal dtypes.
    notes: what whoever gets the folder should know.
    """

    parameters: int
    tensors: int
    tokens: int
    logit_error: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        proof = (
            f"read back from disk: {self.parameters:,} parameters in {self.tensors} tensors are equal, "
            f"logits on {self.tokens:,} tokens differ by {self.logit_error:.2g} of their spread"
        )
        return "\n".join([proof, *self.notes])


def read_back(folder: Path, params: trees.Tree, config: ModelConfig, probe: Probe, *, release: bool = False) -> Verdict:
    """Compares the folder on disk with the live model: configuration, parameter count, every tensor, logits.

    `release` deletes `params` before the copy is loaded, so that the two never take memory together.

    Raises:
      UserError: naming the first thing that differs.
    """
    found = dataclasses.replace(read_config(folder), vocab_multiple=config.vocab_multiple)
    wanted = dataclasses.replace(config, d_ff=config.mlp_width)
    if found != wanted:
        raise UserError(f"{folder}/config.json reads back as {found}, and the live model is {wanted}")
    tensors = open_tensors(folder)
    if isinstance(config, GPTJConfig) and phi.is_phi(tensors):
        tensors = fitting(tensors, config)
    parameters = _compare_count(tensors, config)
    compare_tensors(tensors, params, config)
    logits = _logits(probe, params, config)
    exact = all(_holds(tensors, leaf.dtype) for leaf in jax.tree.leaves(params))
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params)
    if release:
        for leaf in jax.tree.leaves(params):
            leaf.delete()
    difference = logits - _logits(probe, load(folder, config, abstract), config)
    error = float(np.sqrt(np.mean(np.square(difference))) / max(float(np.std(logits)), 1e-30))
    if not error <= (_EXACT if exact else _ROUNDED):
        raise UserError(
            f"{folder}: every tensor is equal, yet the logits differ by {error:.2g} of their spread; not exported"
        )
    return Verdict(parameters=parameters, tensors=len(tensors.entries), tokens=probe.tokens_BT.size, logit_error=error)


def _compare_count(tensors: Tensors, config: ModelConfig) -> int:
    found = sum(math.prod(entry.shape) for entry in tensors.entries.values())
    wanted = sum(math.prod(tensor.shape) for tensor in stored_tensors(config))
    if found != wanted:
        raise UserError(f"{tensors.origin} holds {found:,} parameters, and the live model has {wanted:,}")
    return found


def compare_tensors(tensors: Tensors, params: trees.Tree, config: ModelConfig) -> None:
    """Compares bit for bit, after the rounding that the dtype of `tensors` brings; raises UserError at the first."""
    dtype = _dtype(tensors)
    for tensor, contents in live_tensors(params, config, dtype):
        if tensor.name not in tensors.entries:
            raise UserError(f"{tensors.origin}: {tensor.name} is missing")
        stored = tensors.entries[tensor.name].map()
        if stored.dtype != dtype or stored.shape != contents.shape:
            raise UserError(f"{tensors.origin}: {tensor.name} is {stored.dtype} {stored.shape}")
        bits = np.dtype(f"u{dtype.itemsize}")
        differs = stored.view(bits) != contents.view(bits)
        if differs.any():
            raise UserError(f"{tensors.origin}: {tensor.name} is the first tensor that differs from the live model")


def _dtype(tensors: Tensors) -> np.dtype:
    codes = {entry.code for entry in tensors.entries.values()}
    if len(codes) != 1 or not codes <= set(safetensor.DTYPES):
        raise UserError(f"{tensors.origin} holds tensors of dtypes {sorted(codes)}; one float dtype was to be written")
    return safetensor.DTYPES[codes.pop()]


def _holds(tensors: Tensors, dtype: np.dtype) -> bool:
    """Whether the folder's dtype keeps every value of `dtype`."""
    return np.promote_types(_dtype(tensors), dtype) == _dtype(tensors)


def _logits(probe: Probe, params: trees.Tree, config: ModelConfig) -> np.ndarray:
    return np.asarray(probe.logits(params, probe.tokens_BT), np.float32)[..., : config.vocab_size]
