"""A look at a store: sizes, lengths, the most common tokens, samples; as text and as a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meshgpt.data.store import Split, Store
from meshgpt.errors import UserError

COUNTED_TOKENS = 50_000_000  # of a split, spread over it, for the most common ones
_SLICE = 1_000_000
_BAR = 40  # characters


@dataclass(frozen=True, kw_only=True)
class Look:
    """What was seen of one split.

    Attributes:
        lengths: documents whose tokens number [2^i, 2^(i + 1)), for i from 0.
        common: (token as text, share of all tokens), most common first.
        counted: the tokens that `common` was counted over.
        samples: (document name, beginning of its text).
    """

    split: Split
    lengths: np.ndarray
    common: list[tuple[str, float]]
    counted: int
    samples: list[tuple[str, str]]


def look(store: Store, name: str, common: int = 20, samples: int = 3, characters: int = 300) -> Look:
    """Looks at a split of a store, reading at most `COUNTED_TOKENS` of its tokens."""
    split, tokenizer = store.split(name), store.tokenizer()
    lengths = np.diff(split.documents["end"], prepend=0)
    counts = np.zeros(store.vocab_size, np.int64)
    slices = range(0, split.num_tokens, _SLICE)
    for start in slices[:: max(1, len(slices) * _SLICE // COUNTED_TOKENS)]:
        tokens = split.tokens(start, min(start + _SLICE, split.num_tokens))
        counts += np.bincount(tokens, minlength=store.vocab_size)
    counted = int(counts.sum())
    top = np.argsort(-counts, kind="stable")[:common]
    picked = np.linspace(0, split.num_documents - 1, min(samples, split.num_documents)).astype(int)
    return Look(
        split=split,
        lengths=np.bincount(np.log2(np.maximum(lengths, 1)).astype(int)) if len(lengths) else np.zeros(1, int),
        common=[(tokenizer.decode([int(i)]), float(counts[i] / counted)) for i in top if counts[i]],
        counted=counted,
        samples=[
            (split.document_name(i), tokenizer.decode(split.document_tokens(i)[:characters])[:characters])
            for i in picked.tolist()
        ],
    )


def as_text(store: Store, looks: Sequence[Look]) -> str:
    """What was seen, for a terminal."""
    counts = store.index["counts"]
    total = sum(one.split.num_bytes for one in looks)
    unknown = counts["replaced"] / total if total else 0.0
    lines = [f"store {store.folder}, digest {store.digest[:12]}, {store.vocab_size:,} token ids"]
    lines.append(
        f"unknown bytes: {counts['replaced']:,} replaced ({unknown:.4%}), in {counts['replaced_documents']:,} "
        f"documents; bad records skipped: {counts['bad_records']:,}; duplicates dropped: {counts['duplicates']:,}"
    )
    if counts.get("lossy_documents"):
        lines.append(
            f"lost by the tokenizer: {counts['lost_characters']:,} characters, with {counts['unknown_tokens']:,} "
            f"unknown tokens, in {counts['lossy_documents']:,} documents"
        )
    lines += [f"  bad: {message}" for message in counts["first_bad"]]
    for one in looks:
        split = one.split
        lines += ["", f"{split.name}: {split.num_documents:,} documents, {split.num_tokens:,} tokens"]
        if not split.num_documents:
            continue
        per_token = split.num_bytes / split.num_tokens
        lines[-1] += f", {split.num_bytes:,} bytes, {per_token:.3f} bytes a token"
        lines.append("tokens of a document:")
        for i, number in enumerate(one.lengths.tolist()):
            bar = "#" * round(_BAR * number / one.lengths.max())
            lines.append(f"  {1 << i:>11,} - {(2 << i) - 1:<11,} {number:>11,} {bar}")
        lines.append(f"most common of {one.counted:,} tokens:")
        lines.append("  " + "  ".join(f"{text!r} {share:.2%}" for text, share in one.common))
        for name, text in one.samples:
            lines += [f"--- {name}", text]
    return "\n".join(lines)


def as_picture(store: Store, looks: Sequence[Look], path: Path) -> None:
    """The same as a PNG: a row for each split, lengths on the left and common tokens on the right.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    looks = [one for one in looks if one.split.num_documents]
    figure = Figure(figsize=(12, 4.5 * len(looks)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{store.folder}  ({store.digest[:12]})")
    for one, axes in zip(looks, figure.subplots(len(looks), 2, squeeze=False), strict=True):
        left, right = axes
        left.bar(range(len(one.lengths)), one.lengths, width=0.9)
        left.set_xticks(range(len(one.lengths)), [f"{1 << i:,}" for i in range(len(one.lengths))], rotation=45)
        left.set_xlabel("tokens of a document (from)")
        left.set_ylabel("documents")
        left.set_title(f"{one.split.name}: {one.split.num_documents:,} documents, {one.split.num_tokens:,} tokens")
        names = [repr(text).replace("$", r"\$") for text, _ in one.common]
        right.barh(range(len(names)), [share for _, share in one.common])
        right.set_yticks(range(len(names)), names, fontsize=8)
        right.invert_yaxis()
        right.set_xlabel("share of tokens")
        right.set_title(f"most common; {one.split.num_bytes / one.split.num_tokens:.3f} bytes a token")
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise UserError(f"cannot write the picture {path}: {error.strerror}; name another place with --png") from error
