"""TensorFlow Datasets by name, without TensorFlow: ``tfds:lm1b/train:text``.

What was prepared with ``file_format="array_record"`` can be read at any record, so a data set is listed as slices, and
an interrupted `prepare` goes on in the slice where it stopped.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

from meshgpt.data import fields
from meshgpt.data.blocks import Origin, record_blocks
from meshgpt.data.failures import BadInputError
from meshgpt.data.hf_source import named
from meshgpt.data.pieces import Piece, pieces
from meshgpt.data.streams import FileDigest
from meshgpt.errors import UserError, explained

PREFIX = "tfds:"
_SLICE = 20_000  # records
_SPELLING = "tfds:NAME/SPLIT:FIELD, such as tfds:lm1b/train:text; NAME may be the folder of one that was built locally"


@final
class Slice:
    """Records [start, stop) of a split; a `sources.Input`."""

    small = False
    earlier: str | None

    def __init__(self, source: str, records: Any, field: str, version: tuple[str, str], start: int, stop: int):
        self.name = self.location = f"{source}[{start}:{stop}]"
        self.size = stop - start
        self.version: str
        self.version, self.earlier = version
        self._records_of, self._field, self._start, self._stop = records, field, start, stop

    def read(self, origin: Origin) -> Iterator[Piece]:
        digest = hashlib.sha256()
        return pieces(
            record_blocks(self._records(origin, digest), origin, self._start + 1),
            origin,
            lambda block: block.spans[0].record - 1 - self._start,
            lambda: FileDigest(name=self.name, size=self.size, sha256=digest.hexdigest()),
        )

    def _records(self, origin: Origin, digest: Any) -> Iterator[bytes | UserError]:
        take = fields.ids_of if origin.token_ids else fields.bytes_of
        for number in range(self._start, self._stop):
            try:
                row = self._records_of[number]
            except (ValueError, OSError, RuntimeError) as error:
                text = f"record {number + 1} of {self.name} cannot be read ({error}): build it again"
                if isinstance(error, OSError) and error.errno is not None:  # else of a damaged file
                    raise explained(error, text) from error
                raise BadInputError(text) from error
            try:
                data = take(row, self._field, f"{self.name}:{number + 1}")
            except BadInputError as error:
                yield error
            else:
                digest.update(len(data).to_bytes(8, "little") + data)
                yield data


def list_inputs(source: str) -> list[Slice]:
    """The slices of ``tfds:NAME/SPLIT:FIELD``.

    Raises:
        UserError: misspelt, not built on this machine, in another format, or without that split or field.
    """
    name, split, part, field = named(source, PREFIX, _SPELLING)
    builder = _builder(source, name)
    if split not in builder.info.splits:
        raise UserError(f"source {source!r}: there is no split {split!r}, only {sorted(builder.info.splits)}")
    features = builder.info.features
    for wanted in fields.names(field):
        if features is None or (wanted not in features and wanted.split(".")[0] not in features):
            raise UserError(f"source {source!r}: there is no field {wanted!r}, only {sorted(features or ())}")
    try:
        records = builder.as_data_source(split=f"{split}[{part}]" if part else split)
    except (NotImplementedError, ValueError, OSError, AssertionError) as error:
        raise UserError(
            f"source {source!r} cannot be read at any record ({error}): build it with file_format='array_record'"
        ) from error
    about = builder.info.splits[split]
    earlier = f"{builder.info.full_name} {about.shard_lengths} {about.num_bytes}"
    version = f"{earlier} {_fingerprint(about)}"
    count = len(records)
    if not count:
        raise UserError(f"source {source!r} is empty")
    starts = range(0, count, _SLICE)
    return [Slice(source, records, field, (version, earlier), start, min(start + _SLICE, count)) for start in starts]


def _fingerprint(about: Any) -> str:
    """A digest of the names, sizes and times of the files of a split."""
    told = []
    for path in about.filepaths:
        status = os.stat(path) if os.path.exists(path) else None
        told.append([Path(path).name, status and status.st_size, status and status.st_mtime_ns])
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _builder(source: str, name: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        if Path(name, "dataset_info.json").is_file():
            return tfds.builder_from_directory(name)
        return tfds.builder(name, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError, OSError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"source {source!r} is not there ({first}): spell it {_SPELLING}") from error
