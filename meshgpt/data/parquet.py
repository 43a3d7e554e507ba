"""Parquet files: every row of one column is a document. Needs pyarrow (extra `parquet`).

Memory: a row group's compressed pages at most, and one value; values above a block are cut like any long document.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from typing import IO, TYPE_CHECKING, Any, final

from meshgpt.data import fields, formats
from meshgpt.data.blocks import Origin, record_blocks
from meshgpt.data.failures import BadInputError
from meshgpt.data.pieces import Piece, pieces
from meshgpt.data.streams import FileDigest, open_file
from meshgpt.data.text_files import SourceFile
from meshgpt.errors import UserError

if TYPE_CHECKING:
    import pyarrow.parquet

_ROWS = 256  # decoded at a time


@final
class Parquet:
    """A ``.parquet`` file; a `sources.Input`."""

    small = False

    def __init__(self, file: SourceFile):
        self._file = file
        self.name, self.size, self.version, self.location = file.name, file.size, file.version, file.location
        self.earlier = None if file.new else file.version

    def read(self, origin: Origin) -> Iterator[Piece]:
        progress = [0.0]
        digest = hashlib.sha256()
        blocks = record_blocks(self._records(origin, progress, digest), origin)
        return pieces(
            blocks,
            origin,
            lambda _: int(progress[0] * self.size),
            lambda: FileDigest(name=self.name, size=self.size, sha256=digest.hexdigest()),
        )

    def _records(self, origin: Origin, progress: list[float], digest: Any) -> Iterator[bytes | UserError]:
        field = origin.field
        take = fields.ids_of if origin.token_ids else fields.bytes_of
        rows = 0
        try:
            with ExitStack() as stack:
                file = stack.enter_context(self._open(stack))
                columns = fields.columns(field, file.schema_arrow.names, self.name)
                for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
                    for row in batch.to_pylist():
                        rows += 1
                        progress[0] = rows / file.metadata.num_rows
                        try:
                            data = take(row, field, f"{self.name}:{rows}", "column")
                        except BadInputError as error:
                            yield error
                        else:
                            digest.update(len(data).to_bytes(8, "little") + data)
                            yield data
        except OSError as error:
            if error.errno is None and "://" not in self._file.path:  # pyarrow's word for broken pages
                raise BadInputError(
                    f"{self.name} is no parquet file, or a damaged one ({error}): fetch it again"
                ) from error
            raise

    def _open(self, stack: ExitStack) -> "pyarrow.parquet.ParquetFile":
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise UserError(f"{self.name} needs pyarrow: pip install 'meshgpt[parquet]'") from error
        file = self._file
        if formats.compression(file.name) or type(file) is not SourceFile:  # it is read from both ends
            return parquet.ParquetFile(self._unpacked(stack), pre_buffer=False)
        remote = "://" in file.path
        return parquet.ParquetFile(stack.enter_context(file.open()) if remote else file.path, pre_buffer=False)

    def _unpacked(self, stack: ExitStack) -> IO[bytes]:
        spool = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        with open_file(self._file) as (stream, _):
            shutil.copyfileobj(stream, spool)
        spool.seek(0)
        return spool
