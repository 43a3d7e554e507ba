"""Parquet files: every row of one column is a document. Needs pyarrow (extra `parquet`).

Memory: a row group's compressed pages at most, and one value; values above a block are cut like any long document.
"""

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, final

from meshgpt.data.blocks import Origin, record_blocks
from meshgpt.data.documents import Block
from meshgpt.data.streams import FileDigest
from meshgpt.data.text_files import SourceFile
from meshgpt.errors import UserError, explained

if TYPE_CHECKING:
    import pyarrow.parquet

_ROWS = 256  # decoded at a time


@final
class Parquet:
    """A ``.parquet`` file; a `sources.Input`."""

    small = False

    def __init__(self, file: SourceFile):
        self._path = file.path
        self.name, self.size, self.version, self.location = file.name, file.size, file.version, file.location

    def read(self, origin: Origin) -> Iterator[tuple[Block, FileDigest | None, int]]:
        progress = [0.0]
        digest = hashlib.sha256()
        held: Block | None = None
        for block in record_blocks(self._records(origin.field, progress, digest), origin):
            if held is not None:
                yield held, None, int(progress[0] * self.size)
            held = block
        assert held is not None
        yield held, FileDigest(name=self.name, size=self.size, sha256=digest.hexdigest()), self.size

    def _records(self, field: str, progress: list[float], digest: Any) -> Iterator[bytes | UserError]:
        import pyarrow

        rows = 0
        try:
            with self._open() as file:
                if field not in file.schema_arrow.names:
                    raise UserError(
                        f"{self.name} has no column {field!r}, only {file.schema_arrow.names}: name it with --field"
                    )
                for batch in file.iter_batches(batch_size=_ROWS, columns=[field]):
                    for value in batch.column(0).to_pylist():
                        rows += 1
                        progress[0] = rows / file.metadata.num_rows
                        data = value.encode() if isinstance(value, str) else value
                        if isinstance(data, bytes):
                            digest.update(len(data).to_bytes(8, "little") + data)
                            yield data
                        else:
                            kind = "null" if value is None else type(value).__name__
                            yield UserError(f"{self.name}:{rows}: column {field!r} is a {kind}, not text")
        except (pyarrow.ArrowException, OSError) as error:
            text = f"{self.name} is no parquet file, or a damaged one ({error}): fetch it again"
            numbered = isinstance(error, OSError) and error.errno is not None  # else of a damaged file
            raise (explained(error, text) if numbered else UserError(text)) from error

    def _open(self) -> "pyarrow.parquet.ParquetFile":
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise UserError(f"{self.name} needs pyarrow: pip install 'meshgpt[parquet]'") from error
        if "://" not in self._path:
            return parquet.ParquetFile(self._path, pre_buffer=False)
        import fsspec

        handle: Any = fsspec.open(self._path, "rb").open()  # pyright: ignore[reportAttributeAccessIssue]
        return parquet.ParquetFile(handle, pre_buffer=False)
