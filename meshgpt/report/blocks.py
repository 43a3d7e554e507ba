"""A document as plain blocks, and these as Markdown and as HTML. Every text in a block is data, never markup."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Sequence
from typing import TypeAlias


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heading:
    """level: 1 is the document's title."""

    level: int
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """A paragraph."""

    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bullets:
    """An unordered list."""

    items: Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Code:
    """Lines to be copied; language as Markdown fences name it."""

    language: str
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """strong: the rows (by number) that stand out. note: a paragraph below."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: Sequence[int] = ()
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A plot: its panel's slug, and what it shows in words."""

    slug: str
    caption: str


Block: TypeAlias = Heading | Text | Bullets | Code | Table | Figure


def clean(text: str) -> str:
    """`text` on one line, with whatever does not print (control characters, broken UTF-8) as U+FFFD."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)


def to_markdown(blocks: Sequence[Block], figures: str) -> str:
    """The blocks as Markdown; `figures` is the folder of the plots, seen from the document."""
    return "\n\n".join(_markdown(block, figures) for block in blocks) + "\n"


def to_html(blocks: Sequence[Block]) -> str:
    """The blocks as HTML; a figure is an empty place for the chart of its panel."""
    return "\n".join(_html(block) for block in blocks)


def _markdown(block: Block, figures: str) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_escape(block.text)}"
        case Text():
            return _escape(block.text)
        case Bullets():
            return "\n".join(f"- {_escape(item)}" for item in block.items)
        case Code():
            return f"{_fence(block.text)}{block.language}\n{block.text}\n{_fence(block.text)}"
        case Figure():
            return f"![{_escape(block.caption)}]({figures}/{block.slug}.png)"
        case Table():
            rows = [_markdown_row(row, number in block.strong) for number, row in enumerate(block.rows)]
            lines = [_markdown_row(block.header, False), "|" + "---|" * len(block.header), *rows]
            return "\n".join(lines) + (f"\n\n{_escape(block.note)}" if block.note else "")


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{_quote(block.text)}</h{block.level}>"
        case Text():
            return f"<p>{_quote(block.text)}</p>"
        case Bullets():
            return "<ul>" + "".join(f"<li>{_quote(item)}</li>" for item in block.items) + "</ul>"
        case Code():
            return f"<pre><code>{html.escape(block.text)}</code></pre>"
        case Figure():
            return (
                f'<figure data-panel="{_quote(block.slug)}"><figcaption>{_quote(block.caption)}</figcaption></figure>'
            )
        case Table():
            head = "".join(f"<th>{_quote(cell)}</th>" for cell in block.header)
            rows = "".join(_html_row(row, number in block.strong) for number, row in enumerate(block.rows))
            wide = ' class="wide"' if len(block.header) > 2 else ""
            table = (
                f'<div class="scroll"><table{wide}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
            )
            return table + (f'<p class="note">{_quote(block.note)}</p>' if block.note else "")


def _markdown_row(cells: Sequence[str], strong: bool) -> str:
    shown = [f"**{_escape(cell)}**" if strong and cell else _escape(cell) for cell in cells]
    return "| " + " | ".join(shown) + " |"


def _html_row(cells: Sequence[str], strong: bool) -> str:
    row = "".join(f"<td>{_quote(cell)}</td>" for cell in cells)
    return f'<tr class="strong">{row}</tr>' if strong else f"<tr>{row}</tr>"


def _quote(text: str) -> str:
    return html.escape(clean(text))


def _escape(text: str) -> str:
    """Markdown that shows `text` as it is, in a paragraph, a list, a heading or a table's cell."""
    escaped = re.sub(
        r"([\\`*\[\]|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", html.escape(clean(text), quote=False)
    )
    return re.sub(r"^(\s*)(\d*)([#+\-.)])(?=\s|$)", r"\1\2\\\3", escaped)


def _fence(text: str) -> str:
    """Backticks, more than `text` has in a row."""
    return "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
