"""Writes pages while mkdocs builds: the repository's own Markdown, the configuration, the commands, and the API.

Package, dataclasses and verbs are walked, so that one that is added, moved or renamed needs no change here.
"""

import dataclasses
import html
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import griffe
import mkdocs_gen_files
import tyro

from meshgpt.cli import verbs
from meshgpt.config import Run
from meshgpt.distributed import processes
from meshgpt.flags import field_help

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = griffe.load("meshgpt", search_paths=[ROOT])


def write(path: str, text: str) -> None:
    with mkdocs_gen_files.open(path, "w") as file:
        file.write(text)


def repository_page(name: str) -> str:
    """A page of the repository's root; its links into docs/ lead on, those to other files become plain names."""
    text = (ROOT / name).read_text().replace("](docs/", "](").replace("](CONTRIBUTING.md)", "](contributing.md)")

    def link(match: re.Match[str]) -> str:
        label, target = match.groups()
        known = "://" in target or target.startswith(("#", "images/")) or target.partition("#")[0].endswith(".md")
        return match.group(0) if known else f"`{label}`"

    return re.sub(r"(?<!!)\[([^\]\n]+)\]\(([^)\s]+)\)", link, text)


def dataclasses_of(hint: Any) -> Iterator[type]:
    """The dataclasses that an annotation names, through unions and tuples."""
    if inspect.isclass(hint) and dataclasses.is_dataclass(hint):
        yield hint
    for part in typing.get_args(hint):
        yield from dataclasses_of(part)


def spelled(hint: Any) -> str:
    """An annotation as it is read: without the modules of its names."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " | ".join(spelled(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is None and inspect.isclass(hint):
        return "None" if hint is types.NoneType else hint.__name__
    return re.sub(r"\b(?:\w+\.)+", "", str(hint))


def default_of(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if dataclasses.is_dataclass(value):
        return f"`{type(value).__name__}()`"
    return code(f"'{value}'" if isinstance(value, Path) else repr(value))


def code(text: str) -> str:
    """Code in a cell of a table, where a bar must not end the cell."""
    return f"`{text}`" if "|" not in text else f"<code>{html.escape(text, quote=False).replace('|', '&#124;')}</code>"


def cell(text: str) -> str:
    """Prose as a cell of a table: outside of its code, no character ends the cell or is taken for HTML."""
    parts = " ".join(text.split()).split("`")
    parts[::2] = [html.escape(part, quote=False).replace("|", "\\|") for part in parts[::2]]
    return "`".join(parts)


def as_field(name: str, positional: bool) -> str:
    del positional
    return name


def as_flag(name: str, positional: bool) -> str:
    return name.upper() if positional else f"--{name.replace('_', '-')}"


def fields_table(cls: type, called: Callable[[str, bool], str] = as_field) -> list[str]:
    """A table of a dataclass's fields, with the docstrings below them; `called` gives a field's name there."""
    hints, texts = typing.get_type_hints(cls), field_help(cls)
    marked = typing.get_type_hints(cls, include_extras=True)
    lines = ["| name | type | default | what it is |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        marks = getattr(marked[field.name], "__metadata__", ())
        own = next((mark.name for mark in marks if getattr(mark, "name", None)), field.name)
        name, kind = called(own, tyro.conf.Positional in marks), code(spelled(hints[field.name]))
        lines.append(f"| `{name}` | {kind} | {default_of(field)} | {cell(texts[field.name])} |")
    return [*lines, ""]


def described(cls: type) -> str:
    """A section of the configuration reference: one dataclass."""
    return "\n".join([f"## {cls.__name__}", "", inspect.getdoc(cls) or "", "", *fields_table(cls)])


def reachable(roots: Sequence[type]) -> list[type]:
    """`roots` and every dataclass that a field of them may hold, and so on."""
    found = list(roots)
    for cls in found:
        for hint in typing.get_type_hints(cls).values():
            found += [part for part in dataclasses_of(hint) if part not in found]
    return list(dict.fromkeys(found))


def configuration() -> str:
    """Every dataclass that a `Run` may hold, the run itself first."""
    opening = """# Configuration

A recipe returns a `Run`. Every field is also a flag: the field `peak_lr` of `optim` is `--optim.peak-lr`.
"""
    return "\n".join([opening, *(described(cls) for cls in reachable([Run]))])


COMMANDS = """# Commands

Flags and positional words may stand in any order. Where a type is named that has a section below or in
[Configuration](configuration.md), its fields are flags too: the field `data` of `mesh` is `--mesh.data`. A verb that
takes a recipe takes the recipe's flags besides its own.
"""
SEVERAL = """## Several processes

`meshgpt train` and `meshgpt eval` take these too.

| flag | what it is |
|---|---|"""


def command(name: str, verb: verbs.Verb) -> list[str]:
    """A section of the reference of commands: one verb with its flags."""
    lines = [f"## {name}", "", f"`{name}` {html.escape(verb.summary, quote=False)}", ""]
    if not verb.settings:
        return lines
    cls = verbs.named(verb.settings)
    if cls is Run:
        return [*lines, "The flags are the fields of the run: see [Configuration](configuration.md).", ""]
    return [*lines, inspect.getdoc(cls) or "", "", *fields_table(cls, as_flag)]


def commands() -> str:
    """Every verb with its flags."""
    tables = {"meshgpt": verbs.VERBS, "meshgpt plan": verbs.PLANS, "meshgpt data": verbs.DATA}
    found = {f"{program} {name}": verb for program, table in tables.items() for name, verb in table.items()}
    lines = [COMMANDS, *(line for name, verb in found.items() for line in command(name, verb)), SEVERAL]
    lines += [f"| `{as_flag(name, False)}` | {cell(text)} |" for name, text in processes.FLAGS.items()]
    roots = [verbs.named(verb.settings) for verb in found.values() if verb.settings]
    beside = [cls for cls in reachable(roots) if cls not in roots and cls not in reachable([Run])]
    return "\n".join([*lines, "", *(described(cls) for cls in beside)])


def modules(module: griffe.Module) -> Iterator[griffe.Module]:
    yield module
    for _, member in sorted(module.modules.items()):
        if not member.is_alias:  # a module that another one imports has its own place
            yield from modules(member)


def api() -> None:
    """A page a module, and the list of them."""
    listing = []
    for module in modules(PACKAGE):
        if any(part.startswith("_") for part in module.path.split(".")):
            continue
        page = f"{module.path}.md"
        write(f"api/{page}", f"# {module.path}\n\n::: {module.path}\n    options:\n      show_root_heading: false\n")
        listing.append(f"* [{module.path}]({page})\n")
    write("api/SUMMARY.md", "".join(listing))


for source, target in {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}.items():
    write(target, repository_page(source))
write("configuration.md", configuration())
write("commands.md", commands())
api()
