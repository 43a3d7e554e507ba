"""Changes to a model on its way in: another vocabulary, a longer or shorter context.

They are made on the stored tensors, one at a time and only when it is read, so that they stream like all others.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, TypeVar

import numpy as np

from meshgpt.convert.hf_names import ModelConfig
from meshgpt.convert.tensors import Entry, Tensors
from meshgpt.errors import UserError
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.settings import settings

AnyConfig = TypeVar("AnyConfig", bound=ModelConfig)

_VOCABULARY = ("transformer.wte.weight", "lm_head.weight", "lm_head.bias")
_POSITIONS = "transformer.wpe.weight"


@settings()
class Surgery:
    """What to change in a model that is imported."""

    vocab_size: int = 0
    """Number of rows of the embedding and the head; 0 leaves it. New rows start at the mean of the old (Hewitt 2021:
    the model's predictions for the old ids then change least), and the last ones go if it is smaller."""
    n_positions: int = 0
    """Longest context, in tokens; 0 leaves it. GPT-J's rotary positions need no table, and GPT-2's is made by
    `extend`."""
    extend: Literal["interpolate", "tile"] = "interpolate"
    """How GPT-2's table of positions becomes longer: `interpolate` stretches it over the new length, linearly between
    neighbours, so that every row changes and the order of positions is kept; `tile` repeats it, so that the old length
    computes what it did."""
    ignore_extra: bool = False
    """Leave out the heads that other tools put beside the model, such as `v_head` and `score`; what is left out is
    said. Tensors that belong in the model are never left out."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions"):
            if getattr(self, name) < 0:
                raise UserError(f"surgery.{name}={getattr(self, name)}: give a positive number, or 0 to change nothing")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changed:
    """A stored tensor whose rows are changed when it is read."""

    stored: Entry
    rows: int
    change: Callable[[np.ndarray, int], np.ndarray]

    @property
    def code(self) -> str:
        return self.stored.code

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.stored.shape[1:])

    def map(self) -> np.ndarray:
        return self.change(self.stored.map(), self.rows)


def operate(tensors: Tensors, config: AnyConfig, surgery: Surgery) -> tuple[Tensors, AnyConfig, tuple[str, ...]]:
    """The tensors and the configuration after `surgery`, and a line on each change."""
    entries = dict(tensors.entries)
    notes: list[str] = []
    if surgery.vocab_size not in (0, config.vocab_size):
        for name in entries.keys() & set(_VOCABULARY):
            entries[name] = Changed(stored=entries[name], rows=surgery.vocab_size, change=with_mean_rows)
        notes.append(_vocabulary_note(config.vocab_size, surgery.vocab_size))
        config = dataclasses.replace(config, vocab_size=surgery.vocab_size)
    if surgery.n_positions not in (0, config.n_positions):
        if isinstance(config, GPT2Config):
            change = tiled if surgery.extend == "tile" else interpolated
            entries[_POSITIONS] = Changed(stored=entries[_POSITIONS], rows=surgery.n_positions, change=change)
        notes.append(_positions_note(config, surgery))
        config = dataclasses.replace(config, n_positions=surgery.n_positions)
    return Tensors(origin=tensors.origin, entries=entries), config, tuple(notes)


def with_mean_rows(table: np.ndarray, rows: int) -> np.ndarray:
    """The first `rows` of a table, or all of them followed by copies of their mean."""
    if rows <= table.shape[0]:
        return table[:rows]
    new = np.empty((rows, *table.shape[1:]), table.dtype)
    new[: table.shape[0]] = table
    new[table.shape[0] :] = np.mean(table, axis=0, dtype=np.float64).astype(table.dtype)
    return new


def interpolated(table: np.ndarray, rows: int) -> np.ndarray:
    """The table stretched to `rows`, its first and last rows kept (`align_corners`); a shorter one is cut instead."""
    old = table.shape[0]
    if rows <= old:
        return table[:rows]
    at = np.arange(rows) * ((old - 1) / (rows - 1))
    low = np.minimum(at.astype(int), max(old - 2, 0))
    high = np.minimum(low + 1, old - 1)
    share = (at - low)[:, None]
    return (table[low].astype(np.float64) * (1 - share) + table[high].astype(np.float64) * share).astype(table.dtype)


def tiled(table: np.ndarray, rows: int) -> np.ndarray:
    """The table repeated to `rows`: position i has the row of i modulo the old length."""
    return table[np.arange(rows) % table.shape[0]]


def _vocabulary_note(old: int, new: int) -> str:
    if new < old:
        return f"vocabulary cut from {old:,} to {new:,} ids: the last {old - new:,} rows are gone"
    return f"vocabulary grown from {old:,} to {new:,} ids: the {new - old:,} new rows are the mean of the old"


def _positions_note(config: ModelConfig, surgery: Surgery) -> str:
    old, new = config.n_positions, surgery.n_positions
    if not isinstance(config, GPT2Config):
        return f"context changed from {old:,} to {new:,} tokens; rotary positions need no table"
    if new < old:
        return f"context cut from {old:,} to {new:,} tokens: the last {old - new:,} rows of the position table are gone"
    how = "tiling" if surgery.extend == "tile" else "linear interpolation"
    return f"context extended from {old:,} to {new:,} tokens by {how} of the position table; train before you use it"
