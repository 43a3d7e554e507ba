"""Whether the losses of several runs can be compared: nats a token mean nothing across tokenizers, or across texts."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from meshgpt.data.tokenizer import load_tokenizer
from meshgpt.errors import UserError
from meshgpt.training.run_folder import RunFolder

_SAME = 1e-6  # of figures that are equal but for the rounding of a division


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yardstick:
    """What a run's losses are measured by; None is not known.

    tokenizer: the fingerprint of its tokenizer. bytes_per_token: of the held-out text, by its loss and bits per byte.
    gzip_bits: what `gzip -9` needs a byte of the held-out text, and held_out: its documents and bytes by store; both
    tell texts apart. tokens: of the held-out text that were measured, where that is a part (`eval_batches`).
    """

    tokenizer: str | None = None
    bytes_per_token: float | None = None
    gzip_bits: float | None = None
    held_out: tuple[str, ...] | None = None
    tokens: float | None = None


def read_yardstick(folder: RunFolder, rows: Sequence[dict[str, Any]]) -> Yardstick:
    """Of the run in a folder whose metrics are `rows`."""
    ledger = _ledger(folder)
    fingerprints = {row.get("tokenizer") for row in ledger}
    tokenizer = fingerprints.pop() if len(fingerprints) == 1 else None
    texts = [row["held_out"] for row in ledger if isinstance(row.get("held_out"), str)]
    last = next((row for row in reversed(rows) if _number(row.get("val_loss"))), {})
    return Yardstick(
        tokenizer=tokenizer if isinstance(tokenizer, str) else _fingerprint(folder),
        bytes_per_token=_bytes_per_token(rows),
        gzip_bits=_number(last.get("gzip_bits_per_byte")),
        held_out=tuple(texts) if texts and len(texts) == len(ledger) else None,
        tokens=_number(last.get("val_tokens")),
    )


def other_text(runs: Sequence[tuple[str, Yardstick]]) -> str:
    """Two runs that were not evaluated on the same held-out text, in words; "" where none are known to be."""
    for what, found in (
        ("other held-out text", lambda one: one.gzip_bits),
        ("other held-out text", lambda one: one.held_out),
        ("another part of the held-out text (--eval-batches)", lambda one: one.tokens),
    ):
        if said := _first_that_differs(runs, found, what):
            return said
    return ""


def other_tokens(runs: Sequence[tuple[str, Yardstick]]) -> str:
    """Two runs whose tokens are not the same, in words; "" where none are known to have others."""
    said = _first_that_differs(runs, lambda one: one.tokenizer, "another tokenizer")
    return said or _first_that_differs(
        runs, lambda one: one.bytes_per_token, "other tokens (of other lengths in bytes)"
    )


def _first_that_differs(runs: Sequence[tuple[str, Yardstick]], found: Callable[[Yardstick], object], what: str) -> str:
    known = [(name, value) for name, one in runs if (value := found(one)) is not None]
    for name, value in known[1:]:
        first, expected = known[0]
        if isinstance(value, float) and isinstance(expected, float):
            same = math.isclose(value, expected, rel_tol=_SAME)
        else:
            same = value == expected
        if not same:
            return f"{name} has {what} than {first}"
    return ""


def _ledger(folder: RunFolder) -> list[dict[str, Any]]:
    try:
        rows = json.loads(folder.ledger.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _fingerprint(folder: RunFolder) -> str | None:
    """Of the tokenizer that the run keeps: those of before say it nowhere else."""
    if not folder.tokenizer.is_dir():
        return None
    try:
        return load_tokenizer(folder.tokenizer).fingerprint
    except (UserError, OSError, ValueError):
        return None


def _bytes_per_token(rows: Sequence[dict[str, Any]]) -> float | None:
    """Of the held-out text: one number, whatever the loss; None where the evaluations do not agree on it."""
    pairs = [(_number(row.get("val_loss")), _number(row.get("val_bits_per_byte"))) for row in rows]
    found = [loss / math.log(2) / bits for loss, bits in pairs if loss and bits]
    return found[-1] if found and math.isclose(min(found), max(found), rel_tol=_SAME) else None


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and math.isfinite(value) else None
