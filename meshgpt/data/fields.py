"""Where the text of a record is: a field, a field within fields (``doc.text``), or several in a template."""

import re
import struct
from collections.abc import Mapping
from typing import Any

from meshgpt.data.failures import BadInputError
from meshgpt.errors import UserError

_TEMPLATE = "\0template:"  # no field is called so
_PARTS = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_ESCAPES = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}


def template(text: str) -> str:
    """What `text_of` takes in place of a field: names in braces stand for fields, ``{{`` for a brace.

    A backslash and an n are a line break, as a shell passes them.

    Raises:
        UserError: a brace without its other, or no field.
    """
    names = []
    for part in _PARTS.finditer(text):
        if part.group() in ("{", "}") or part.group(1) == "":
            raise UserError(f"--template {text!r}: name a field in every pair of braces, and write {{{{ for a brace")
        names += [part.group(1)] if part.group(1) else []
    if not names:
        raise UserError(f"--template {text!r} names no field: put one in braces, such as {{question}}")
    return _TEMPLATE + re.sub(r"\\[nt\\]", lambda found: _ESCAPES[found.group()], text)


def is_template(field: str) -> bool:
    """Whether `field` is one of `template`."""
    return field.startswith(_TEMPLATE)


def names(field: str) -> list[str]:
    """The fields of a record that its text is made of."""
    if not is_template(field):
        return [field]
    return [part.group(1) for part in _PARTS.finditer(field.removeprefix(_TEMPLATE)) if part.group(1)]


def columns(field: str, known: list[str], where: str) -> list[str]:
    """The columns to read of a table that has those that are `known`.

    Raises:
        BadInputError: one is not there.
    """
    found = []
    for name in names(field):
        column = name if name in known else name.split(".")[0]
        if column not in known:
            raise BadInputError(f"{where} has no column {name!r}, only {known}: name it with --field")
        found.append(column)
    return list(dict.fromkeys(found))


def text_of(record: Mapping[str, Any], field: str, where: str, what: str = "field") -> str:
    """The text of a record.

    Args:
        field: a name, one with dots where it lies within others, or a `template`.
        what: how messages call a field.

    Raises:
        BadInputError: it is not there, or no text.
    """
    if not is_template(field):
        value = _value(record, field, where, what)
        if isinstance(value, str):
            return value
        raise BadInputError(f"{where}: {what} {field!r} is a {_kind(value)}, not text: name another with --field")

    def filled(part: re.Match[str]) -> str:
        name = part.group(1)
        if not name:
            return part.group()[0]
        value = _value(record, name, where, what)
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
        raise BadInputError(f"{where}: {what} {name!r} is a {_kind(value)}, not text: leave it out of --template")

    return _PARTS.sub(filled, field.removeprefix(_TEMPLATE))


def bytes_of(record: Mapping[str, Any], field: str, where: str, what: str = "field") -> bytes:
    """`text_of` as UTF-8, or as the bytes that a table holds in its place."""
    text = text_of(record, field, where, what)
    try:
        return text.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", errors="surrogatepass")


def ids_of(record: Mapping[str, Any], field: str, where: str, what: str = "field") -> bytes:
    """The token ids of a record, four bytes each.

    Raises:
        BadInputError: it is not there, or no list of token ids.
    """
    value = _value(record, field, where, what)
    try:
        if not isinstance(value, list) or not all(type(one) is int for one in value):
            raise TypeError
        return struct.pack(f"<{len(value)}I", *value)
    except (TypeError, struct.error) as error:
        raise BadInputError(
            f"{where}: {what} {field!r} is no list of token ids: name another with --field, or leave out --token-ids"
        ) from error


def _value(record: Mapping[str, Any], name: str, where: str, what: str) -> Any:
    if name in record:
        return _decoded(record[name])
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            within = value if isinstance(value, Mapping) else record
            raise BadInputError(f"{where} has no {what} {name!r}, only {sorted(within)}: name the text's with --field")
        value = value[part]
    return _decoded(value)


def _decoded(value: Any) -> Any:
    """Tables may have text as bytes; what is not UTF-8 in it is judged as in any text."""
    return value.decode("utf-8", errors="surrogateescape") if isinstance(value, bytes) else value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
