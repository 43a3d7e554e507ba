"""Files to evaluate on: texts, and lines of JSON; plain or compressed."""

import json
from pathlib import Path
from typing import Any

from meshgpt.data import formats
from meshgpt.data.documents import as_text
from meshgpt.data.streams import open_stream
from meshgpt.errors import UserError


def read_texts(path: Path, field: str) -> list[str]:
    """The documents of a file: one where it is a text, one a line (its `field`) where it is `.jsonl` or `.ndjson`.

    Raises:
      UserError: no such file, one that is not UTF-8, without text, or with a line that holds none.
    """
    text = _text(path)
    if _is_lines(path):
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        texts = [as_text(line, field, f"{path}:{number}") for number, line in lines]
    else:
        texts = [text]
    texts = [text for text in texts if text]
    if not texts:
        raise UserError(f"{path} holds no text to measure: name another file")
    return texts


def read_json_lines(path: Path) -> list[tuple[str, Any]]:
    """Where each line of a file stands, and what it holds.

    Raises:
      UserError: no such file, one without lines, or a line that is not JSON.
    """
    found = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append((f"{path}:{number}", json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number} is not valid JSON ({error}): repair or remove that line") from error
    if not found:
        raise UserError(f"{path} holds no lines: name a file of JSON lines")
    return found


def stem(path: Path) -> str:
    """The file's name without its endings, for results."""
    return Path(path.name[: len(path.name) - len(formats.compression(path.name))]).stem


def _is_lines(path: Path) -> bool:
    return formats.kind_of(path.name) == "json_lines"


def _text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path} is no file: name a text or a file of JSON lines")
    with open_stream(str(path), path.name, path.stat().st_size) as (stream, _):
        data = stream.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): convert it") from error
