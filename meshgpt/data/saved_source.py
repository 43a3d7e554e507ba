"""Folders that `save_to_disk` of Hugging Face's `datasets` wrote, by their path. Needs `datasets` (extra `hf`)."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

from meshgpt.data import fields
from meshgpt.data.blocks import Origin, record_blocks
from meshgpt.data.failures import BadInputError, explain
from meshgpt.data.pieces import Piece, pieces
from meshgpt.data.streams import FileDigest
from meshgpt.errors import UserError


def is_one(source: str) -> bool:
    """Whether a source is such a folder."""
    path = Path(source)
    return (path / "dataset_dict.json").is_file() or all(
        (path / name).is_file() for name in ("state.json", "dataset_info.json")
    )


@final
class Saved:
    """Such a folder; a `sources.Input`. Its size is in rows.

    Raises:
        UserError: it cannot be opened, or holds several splits.
    """

    small = False
    earlier: str | None = None

    def __init__(self, source: str):
        path = Path(source)
        if (path / "dataset_dict.json").is_file():
            splits = sorted(child.name for child in path.iterdir() if (child / "state.json").is_file())
            raise UserError(f"source {source!r} holds the splits {splits}: name one, such as {path / splits[0]}")
        try:
            import datasets  # pyright: ignore[reportMissingImports] (extra hf)
        except ImportError as error:
            raise UserError(f"source {source!r} needs the package datasets: pip install 'meshgpt[hf]'") from error
        try:
            self._dataset: Any = datasets.load_from_disk(source)
        except Exception as error:
            raise explain(error, source) from error
        self.name, self.location = source, os.path.realpath(source)
        self.size = len(self._dataset)
        # Its fingerprint follows what was done to it, and not what is in its files.
        files = sorted(path.glob("*.arrow"))
        told = [
            self._dataset._fingerprint,
            *[(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        ]
        self.version = hashlib.sha256(repr(told).encode()).hexdigest()[:16]

    def read(self, origin: Origin) -> Iterator[Piece]:
        digest = hashlib.sha256()
        return pieces(
            record_blocks(self._records(origin, digest), origin),
            origin,
            lambda block: block.spans[0].record,
            lambda: FileDigest(name=self.name, size=self.size, sha256=digest.hexdigest()),
        )

    def _records(self, origin: Origin, digest: Any) -> Iterator[bytes | UserError]:
        field = origin.field
        take = fields.ids_of if origin.token_ids else fields.bytes_of
        columns = fields.columns(field, self._dataset.column_names, self.name)
        for number, row in enumerate(self._dataset.select_columns(columns).with_format(None), start=1):
            try:
                data = take(row, field, f"{self.name}:{number}", "column")
            except BadInputError as error:
                yield error
            else:
                digest.update(len(data).to_bytes(8, "little") + data)
                yield data
