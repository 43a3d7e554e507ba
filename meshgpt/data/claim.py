"""Whose a store's folder is: new, of this very request, or of another one."""

import json
import shutil
from pathlib import Path
from typing import Any

from meshgpt.atomic import write_atomically
from meshgpt.data.store import INDEX
from meshgpt.errors import UserError
from meshgpt.settings import json_text

REQUEST = "request.json"
LOCK = "prepare.lock"
READER = "reader"  # in a request: which generation of readers listed its files


class StoreDiffersError(UserError):
    """A folder holds another store than the one asked for. difference: the first thing in which they differ."""

    def __init__(self, out: Path, difference: str):
        super().__init__(
            f"{out} holds a store made differently ({difference}): "
            "choose another --out, or pass --overwrite to replace it"
        )
        self.difference = difference


def claim(out: Path, request: dict[str, Any], request_of_before: dict[str, Any], overwrite: bool) -> None:
    """Makes sure that `out` is new, or holds this very request, finished or not.

    What is unfinished and of another request is replaced.

    Args:
        request_of_before: the request as stores had it that do not record the reader.

    Raises:
        UserError: it holds another finished store, or something else.
    """
    path = out / REQUEST
    if path.exists():
        held = _held(path)
        finished = (out / INDEX).exists()
        same_files = len(request["files"]) == len(request_of_before["files"])
        if held == request or (held == request_of_before and (finished or same_files)):
            return
        keys = [key for key in {**held, **request} if key != READER]
        different = [key for key in keys if held.get(key) != request.get(key)] or [READER]
        if finished and not overwrite:
            raise StoreDiffersError(out, _difference(different[0], held, request))
        for child in out.iterdir():
            if child.name != LOCK:
                shutil.rmtree(child) if child.is_dir() else child.unlink()
    elif any(child.name != LOCK for child in out.iterdir()):
        raise UserError(f"{out} is not empty and holds no token store: choose another --out")
    write_atomically(path, json_text(request, ensure_ascii=False))


def _held(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        held = None
    return held if isinstance(held, dict) else {}


def _difference(key: str, held: dict[str, Any], request: dict[str, Any]) -> str:
    if key != "files":
        return f"{key} was {held.get(key)!r}, now {request.get(key)!r}"
    before = {tuple(file) for file in held.get("files", ())}
    after = {tuple(file) for file in request["files"]}
    return f"source file {min(before ^ after)[0]} was added, removed or changed" if before != after else "other order"
