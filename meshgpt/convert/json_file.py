"""The JSON files beside a model."""

from pathlib import Path
from typing import Any

from meshgpt.settings import json_text


def write_json(file: Path, contents: dict[str, Any]) -> None:
    """Writes `contents` as the JSON files beside a model are written."""
    file.write_text(json_text(contents, indent=2, sort_keys=True) + "\n")
