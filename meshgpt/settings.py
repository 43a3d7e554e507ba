"""Settings: frozen dataclasses whose numbers are finite, and JSON that every reader takes."""

import dataclasses
import json
import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, dataclass_transform

from meshgpt.errors import UserError

_T = TypeVar("_T")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def settings(where: str = "") -> Callable[[type[_T]], type[_T]]:
    """Makes a class a frozen, keyword-only dataclass of what a user may set.

    Before the class's own `__post_init__`, if it has one, every number in every field is looked at: NaN and infinity
    are refused, since comparisons let NaN through and JSON has neither. `refuse_non_finite` says what is looked into.

    Args:
      where: the place of these fields in a run, such as "optim" or "optim.schedule", which errors name; "" for the
        flags of a command.
    """

    def made(cls: type[_T]) -> type[_T]:
        own: Callable[[Any], None] | None = getattr(cls, "__post_init__", None)

        def __post_init__(self: Any) -> None:
            refuse_non_finite(self, where)
            if own is not None:
                own(self)

        cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
        return dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    return made


def refuse_non_finite(value: Any, where: str = "") -> None:
    """Looks at the numbers in the fields of a dataclass, and in tuples, lists and dicts there.

    A dataclass within is left out: made by `settings`, it was looked at when it was made.

    Raises:
      UserError: one is NaN or infinite.
    """
    for field in dataclasses.fields(value):
        bad = next((x for x in _numbers(getattr(value, field.name)) if not math.isfinite(x)), None)
        if bad is None:
            continue
        name = f"{where}.{field.name}={bad}" if where else f"--{field.name.replace('_', '-')} {bad}"
        raise UserError(f"{name}: give a finite number{field.metadata.get(INSTEAD, '')}")


ADDED_LATER = "added_later"
"""Key in a field's metadata: True where the field came after runs were written. JSON has it only where it is not its
default, and so stays what it was."""

INSTEAD = "instead"
"""Key in a field's metadata: what to give in place of infinity, as the end of the error's sentence."""


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        yield float(value)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, Mapping):
        yield from _numbers(list(value.values()))


def json_text(value: Any, **layout: Any) -> str:
    """`json.dumps`, with null where a number is NaN or infinite: Python would write what JSON (RFC 8259) does not have.

    Args:
      layout: `json.dumps`'s own arguments, such as indent.
    """
    return json.dumps(_with_nulls(value), allow_nan=False, **layout)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _with_nulls(item) for key, item in value.items()}
    return [_with_nulls(item) for item in value] if isinstance(value, tuple | list) else value
