"""Pages that mkdocs-gen-files writes at build time: the repository's own Markdown, the configuration, and the API.

The package is walked, so that a module that is added, moved or renamed needs no change here.
"""

import dataclasses
import html
import inspect
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
import mkdocs_gen_files

from meshgpt.config import Run

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
    return f"`{type(value).__name__}()`" if dataclasses.is_dataclass(value) else f"`{value!r}`"


def cell(text: str) -> str:
    """Prose as a cell of a table: outside of its code, no character ends the cell or is taken for HTML."""
    parts = " ".join(text.split()).split("`")
    parts[::2] = [html.escape(part, quote=False).replace("|", "\\|") for part in parts[::2]]
    return "`".join(parts)


def described(cls: type) -> str:
    """A section of the configuration reference: one dataclass, a row a field."""
    declared = PACKAGE[f"{cls.__module__}.{cls.__qualname__}".removeprefix("meshgpt.")]
    hints = typing.get_type_hints(cls)
    lines = [f"## {cls.__name__}", "", inspect.getdoc(cls) or "", ""]
    lines += ["| field | type | default | what it is |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        member = declared.all_members.get(field.name)
        text = member.docstring.value if member is not None and member.docstring else ""
        kind = spelled(hints[field.name])
        lines.append(f"| `{field.name}` | `{kind}` | {default_of(field)} | {cell(text)} |")
    return "\n".join([*lines, ""])


def configuration() -> str:
    """Every dataclass that a `Run` may hold, the run itself first."""
    found = [Run]
    for cls in found:
        for hint in typing.get_type_hints(cls).values():
            found += [part for part in dataclasses_of(hint) if part not in found]
    opening = """# Configuration

A recipe returns a `Run`. Every field is also a flag: the field `peak_lr` of `optim` is `--optim.peak-lr`.
"""
    return "\n".join([opening, *(described(cls) for cls in dict.fromkeys(found))])


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
api()
