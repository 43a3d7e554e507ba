"""`report.html`: one file without any other, with the document's blocks and a chart for each panel.

Everything of a run (its name, its paths) is data to this page: escaped in the document, JSON without `<` in its script;
and the page's policy lets nothing load or leave.
"""

from __future__ import annotations

import hashlib
import html
import importlib.resources
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from meshgpt.report.blocks import Block, clean, to_html
from meshgpt.report.panels import Panel, Series
from meshgpt.settings import json_text

_MOST_POINTS = 1500


def page(title: str, blocks: Sequence[Block], panels: Sequence[Panel], poll_seconds: float = 0.0) -> str:
    """The page as text. `poll_seconds` above 0: it asks its server for `data.json` so often."""
    template = importlib.resources.files("meshgpt.report").joinpath("page.html").read_text(encoding="utf-8")
    filled = {
        "TITLE": html.escape(clean(title)),
        "SECTIONS": to_html(blocks),
        "DATA": in_script(data(blocks, panels, poll_seconds, with_sections=False)),
        "CONNECT": "'self'" if poll_seconds else "'none'",
    }
    # In one pass, so that nothing of a run that looks like a place to fill is one.
    return re.sub(r"\{\{(TITLE|SECTIONS|DATA|CONNECT)\}\}", lambda match: filled[match[1]], template)


def data(
    blocks: Sequence[Block], panels: Sequence[Panel], poll_seconds: float, with_sections: bool = True
) -> dict[str, Any]:
    """What the page draws, as JSON; `version` changes when anything does."""
    sections = to_html(blocks)
    drawn = [
        {
            "slug": panel.slug,
            "title": panel.title,
            "x_label": panel.x_label,
            "y_label": panel.y_label,
            "series": [_series(series) for series in panel.series],
        }
        for panel in panels
    ]
    version = hashlib.sha256((sections + json_text(drawn)).encode()).hexdigest()[:16]
    return {"version": version, "poll": poll_seconds, "panels": drawn} | (
        {"sections": sections} if with_sections else {}
    )


def in_script(value: Any) -> str:
    """JSON that cannot end the script element it stands in (HTML living standard, 4.12.1.3)."""
    text = json_text(value)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _series(series: Series) -> dict[str, Any]:
    kept = thinned(series.y)
    x, y = series.x[kept], series.y[kept]
    return {
        "label": clean(series.label),
        "kind": series.kind,
        "color": series.color,
        "x": [float(f"{value:.7g}") for value in x],
        "y": [float(f"{value:.6g}") if np.isfinite(value) else None for value in y],
    }


def thinned(y: np.ndarray, most: int = _MOST_POINTS) -> np.ndarray:
    """Indices of at most about `most` of `y`: of each stretch the lowest, the highest, and a gap if there is one."""
    if len(y) <= most:
        return np.arange(len(y))
    kept = {0, len(y) - 1}
    for stretch in np.array_split(np.arange(len(y)), most // 3):
        finite = stretch[np.isfinite(y[stretch])]
        kept |= {int(finite[np.argmin(y[finite])]), int(finite[np.argmax(y[finite])])} if finite.size else set()
        kept |= {int(stretch[~np.isfinite(y[stretch])][0])} if finite.size < stretch.size else set()
    return np.array(sorted(kept))
