"""Flags: the words of a command line as a dataclass, whose fields are explained by the docstrings below them.

--help shows those docstrings, and the configuration reference of the documentation does. tyro is imported only when a
command line is read, so that `meshgpt --help` stays quick.
"""

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from meshgpt.errors import UserError

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

_T = TypeVar("_T")
_MANY = -1

OTHER_NAMES = "other_names"
"""Key in a field's metadata: a tuple of other names of the field, such as earlier ones, that flags are accepted by."""


def parse(
    cls: type[_T],
    arguments: Sequence[str],
    program: str,
    *,
    default: _T | None = None,
    positional: str = "",
    more: str = "",
) -> _T:
    """Reads a command line; flags and positional words may stand in any order.

    Ends the program on --help, with exit code 0, and on a mistake, with exit code 2 and a suggestion.

    Args:
      cls: what to make, a dataclass. Each field is a flag, or positional words where it is marked `Positional`.
      arguments: the words behind the verb.
      program: what the help calls the command, such as "meshgpt export RUN".
      default: what the flags change; without it each field has its own default.
      positional: a flag that takes the positional words, for a `cls` that has no field for them.
      more: what the help says besides the docstring of `cls`.
    """
    import tyro
    from tyro.constructors import MISSING_NONPROP

    words = _positional_first(cls, respelled(cls, arguments), positional)
    return tyro.cli(
        cls,
        prog=program,
        description=f"{inspect.getdoc(cls)}\n\n{more}" if more else None,
        args=words,
        default=MISSING_NONPROP if default is None else default,
        config=(tyro.conf.AvoidSubcommands,),
        registry=_registry(),
    )


@functools.cache
def field_help(cls: type) -> dict[str, str]:
    """The docstrings below the fields of a class, each as one line; a field that has none takes its base class's."""
    found: dict[str, str] = {}
    for part in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found


@functools.cache
def _registry() -> "ConstructorRegistry":
    """Tells tyro to take the help of a dataclass from `field_help`."""
    from tyro.constructors import ConstructorRegistry

    registry = ConstructorRegistry()
    registry.struct_rule(_with_help)
    return registry


def _with_help(info: "StructTypeInfo") -> "StructConstructorSpec | None":
    from tyro.constructors import MISSING, MISSING_NONPROP, StructConstructorSpec, StructFieldSpec

    if not dataclasses.is_dataclass(info.type):
        return None

    def default(field: dataclasses.Field[Any]) -> Any:
        if info.default is MISSING or not (info.default is None or info.default is MISSING_NONPROP):
            return MISSING if info.default is MISSING else getattr(info.default, field.name)
        if field.default is not dataclasses.MISSING:
            return field.default
        return MISSING_NONPROP if field.default_factory is dataclasses.MISSING else field.default_factory()

    hints, texts = typing.get_type_hints(info.type, include_extras=True), field_help(info.type)
    return StructConstructorSpec(
        instantiate=info.type,
        fields=tuple(
            StructFieldSpec(field.name, hints[field.name], default(field), texts.get(field.name))
            for field in dataclasses.fields(info.type)
        ),
    )


def split(cls: type, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the flags of `cls` with their values, all other words), both in the order of `arguments`.

    For a command that takes the flags of a recipe beside its own.
    """
    sizes = {flag.name: flag.size for flag in _flags(cls)}
    own: list[str] = []
    rest: list[str] = []
    missing = 0
    for word in respelled(cls, arguments):
        name, equals, _ = word.partition("=")
        if missing:
            missing -= 1
            own.append(word)
        elif name in sizes:
            missing = 0 if equals else sizes[name]
            own.append(word)
        else:
            rest.append(word)
    return own, rest


def respelled(cls: type, arguments: Sequence[str]) -> list[str]:
    """`arguments` with the flags of `cls` that have another name (`OTHER_NAMES`) called by the name of their field."""
    names = {other: flag.name for flag in _flags(cls) for other in flag.others}
    words = (word.partition("=") for word in arguments)
    return [f"{names.get(name, name)}{equals}{value}" for name, equals, value in words]


class _Flag(NamedTuple):
    """size: how many values it takes, -1 for any number. others: its other spellings."""

    name: str
    size: int
    others: tuple[str, ...] = ()


def _flags(cls: type, prefix: str = "") -> Iterator[_Flag]:
    """The flags of a dataclass, those of the dataclasses in its fields too; none of what is positional."""
    import tyro

    for field, hint, marks in _fields(cls):
        spelled = next((mark.name for mark in marks if getattr(mark, "name", None)), _spelled(field.name))
        inner = [part for part in (hint, *typing.get_args(hint)) if inspect.isclass(part)]
        inner = [part for part in inner if dataclasses.is_dataclass(part)]
        for part in inner:
            bare = tyro.conf.OmitArgPrefixes in marks or any(getattr(mark, "name", None) == "" for mark in marks)
            yield from _flags(part, prefix if bare else f"{prefix}{spelled}.")
        if not inner and tyro.conf.Positional not in marks:
            others = tuple(f"--{prefix}{_spelled(name)}" for name in field.metadata.get(OTHER_NAMES, ()))
            yield _Flag(f"--{prefix}{spelled}", _size(hint), others)
            if hint is bool:
                nots = tuple(f"--{prefix}no-{_spelled(name)}" for name in field.metadata.get(OTHER_NAMES, ()))
                yield _Flag(f"--{prefix}no-{spelled}", 0, nots)


def _fields(cls: type) -> Iterator[tuple[dataclasses.Field[Any], Any, tuple[Any, ...]]]:
    """(field, its annotation, the marks of `Annotated`) of a dataclass."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        marks = hint.__metadata__ if typing.get_origin(hint) is typing.Annotated else ()
        yield field, typing.get_args(hint)[0] if marks else hint, marks


def _spelled(name: str) -> str:
    return name.replace("_", "-")


def _size(hint: Any) -> int:
    return 0 if hint is bool else _MANY if typing.get_origin(hint) is tuple else 1


def _positional_first(cls: type, arguments: Sequence[str], positional: str) -> list[str]:
    """`arguments` with the positional words before all flags.

    A flag that takes any number of values, such as --prompt, would also take positional words that follow it: where
    too few stand elsewhere, they are the last of its words. Words behind `--` are always positional.

    Raises:
      UserError: too few positional words.
    """
    import tyro

    wanted = {field.name: _size(hint) for field, hint, marks in _fields(cls) if tyro.conf.Positional in marks}
    if not (wanted or positional):
        return list(arguments)
    sizes = {flag.name: flag.size for flag in _flags(cls)}
    free: list[str] = []
    groups: list[list[str]] = []  # each flag with its values
    missing = 0
    for index, word in enumerate(arguments):
        if word == "--":
            free += arguments[index + 1 :]
            break
        name, equals, _ = word.partition("=")
        if name.startswith("-") and name != "-" and not re.fullmatch(r"-\.?\d.*", name):
            groups.append([word])
            missing = 0 if equals else sizes.get(_spelled(name), _MANY)
        elif missing:
            groups[-1].append(word)
            missing -= 1
        else:
            free.append(word)
    lacking = (1 if positional or _MANY in wanted.values() else len(wanted)) - len(free)
    for group in reversed(groups):
        known = _spelled(group[0]) in sizes  # tyro says what is wrong with a flag that is not
        if lacking > 0 and (not known or sizes[_spelled(group[0])] == _MANY) and len(group) - 1 - known >= lacking:
            free += group[-lacking:]
            del group[-lacking:]
            break
    if len(free) < len(wanted) and _MANY not in wanted.values() and not {"-h", "--help"} & set(arguments):
        names = " and ".join(name.upper() for name in list(wanted)[len(free) :])
        raise UserError(f"{names} is missing: {field_help(cls)[list(wanted)[len(free)]]} --help lists all flags")
    flags = [word for group in groups for word in group]
    return [*([positional] if positional and free else []), *free, *flags]
