"""A model in fewer bits, as other tools load it: written tensor by tensor, measured, and only then given its name."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from meshgpt import trees
from meshgpt.convert.atomic_folder import staged
from meshgpt.convert.bitsandbytes_read import LowBit
from meshgpt.convert.bitsandbytes_write import Contents
from meshgpt.convert.hf_names import ModelConfig, stored_tensors
from meshgpt.convert.tensors import Tensors
from meshgpt.data.tokenizer import Tokenizer


class Form(Protocol):
    """What a model is quantized to: `BnbForm`, `GgufForm`."""

    @property
    def marker(self) -> str:
        """The file that says that a folder holds such a model."""
        ...

    def check(self, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
        """Raises UserError for a model that this form does not hold."""
        ...

    def nbytes(self, config: ModelConfig) -> int:
        """Bytes of all tensors, nearly."""
        ...

    def write(
        self,
        contents: Contents,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        folder: Path,
        on_progress: Callable[[int, int], None],
    ) -> None:
        """Writes the model into `folder`; the host holds one tensor at a time."""
        ...

    def load(self, folder: Path, config: ModelConfig, abstract: trees.Tree) -> trees.Tree:
        """The parameters in `folder`, placed like `abstract`; in few bits where the form has weights for that."""
        ...


def quantize(
    contents: Contents,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    form: Form,
    out: Path,
    finish: Callable[[Path], None],
    on_progress: Callable[[int, int], None],
) -> None:
    """Writes `out`, which appears complete or not at all.

    Args:
      contents: every tensor of `config`, in the order of `stored_tensors`.
      tokenizer: None leaves it out, where `form` can.
      finish: is called with the folder before it gets its name, to measure it or add files.
      on_progress: called with tensors written and tensors in all.

    Raises:
      UserError: `out` is taken, the disk too small, a model that `form` does not hold, a value that is not finite.
    """
    form.check(config, tokenizer)
    with staged(out, form.nbytes(config), marker=form.marker, replace=False) as folder:
        form.write(contents, config, tokenizer, folder, on_progress)
        finish(folder)


def contents_of(tensors: Tensors, config: ModelConfig) -> Contents:
    """The tensors of a checkpoint, which are those of `config`, mapped one at a time; float64 is rounded to float32."""
    for tensor in stored_tensors(config):
        array = tensors.entries[tensor.name].map()
        with np.errstate(over="ignore"):  # whoever writes it says what is not finite, by name
            yield tensor, array.astype(np.float32) if array.dtype == np.float64 else array


def is_quantized(tensors: Tensors) -> bool:
    """Whether a checkpoint holds weights of few bits already."""
    return any(isinstance(entry, LowBit) for entry in tensors.entries.values())
