"""Whether two tokenizers give equal ids for every text, and if not, in what they differ."""

from itertools import zip_longest
from typing import Any

from meshgpt.data.tokenizer import Tokenizer

_EXAMPLES = 3


def difference(one: Tokenizer, other: Tokenizer) -> str:
    """Why texts can get other ids from `other` than from `one`, in words; "" where they get the same.

    Whole vocabularies, merges (or scores) and rules of normalisation and splitting are compared, no samples. Special
    tokens that only one of them has do not count, as text is never encoded as one; a token that both have, and one of
    them calls special, does.
    """
    if one.fingerprint == other.fingerprint:
        return _withheld(one, other)
    first, second = one.definition(), other.definition()
    found = [
        _vocabularies(first.vocabulary, second.vocabulary, first.special, second.special),
        _lists("merges", first.merges, second.merges),
        _rules(first.rules, second.rules),
        _withheld(one, other),
    ]
    return "; ".join(filter(None, found))


def _vocabularies(one: dict[str, int], other: dict[str, int], special: set[str], other_special: set[str]) -> str:
    left_out = (special - other.keys()) | (other_special - one.keys())
    pieces, others = ({i: piece for piece, i in v.items() if piece not in left_out} for v in (one, other))
    differing = [i for i in sorted(pieces.keys() | others.keys()) if pieces.get(i) != others.get(i)]
    if not differing:
        return ""
    shown = ", ".join(f"{i} is {_name(pieces.get(i))} and {_name(others.get(i))}" for i in differing[:_EXAMPLES])
    return f"{len(differing):,} of {max(len(pieces), len(others)):,} ids stand for other pieces (id {shown})"


def _withheld(one: Tokenizer, other: Tokenizer) -> str:
    differing = sorted(one.withheld ^ other.withheld)
    return f"only one of them finds {', '.join(map(repr, differing[:_EXAMPLES]))} in text" if differing else ""


def _name(piece: str | None) -> str:
    return "nothing" if piece is None else repr(piece)


def _lists(what: str, one: list[Any], other: list[Any]) -> str:
    for number, (a, b) in enumerate(zip_longest(one, other), start=1):
        if a != b:
            return f"{what} differ from number {number:,} on ({a!r} and {b!r})"
    return ""


def _rules(one: dict[str, Any], other: dict[str, Any]) -> str:
    names = [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]
    return ", ".join(f"{name} is {_short(one.get(name))} and {_short(other.get(name))}" for name in names)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
