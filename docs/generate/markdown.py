"""An mkdocs hook: pages are written as GitHub renders them, and Python-Markdown wants a blank line before a list."""

import re
from typing import Any

_ITEM = re.compile(r"\s*(?:[-*]|\d+\.) ")
_TABLE = re.compile(r"\|.*\|\s*$")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`markdown` with a blank line before each list or table that directly follows a paragraph."""
    lines: list[str] = []
    in_code = in_list = False
    for line in markdown.split("\n"):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        previous = lines[-1] if lines else ""
        item = bool(_ITEM.match(line)) and not in_code
        table = bool(_TABLE.match(line)) and not in_code and not _TABLE.match(previous)
        if previous.strip() and ((item and not in_list) or table):
            lines.append("")
        # Python-Markdown nests by four columns, GitHub by the width of the bullet.
        in_list = not in_code and (item or (in_list and (line.startswith(" ") or not line.strip())))
        lines.append(line)
    return "\n".join(lines)
