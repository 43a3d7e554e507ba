"""TensorFlow Datasets by name, without TensorFlow: ``tfds:lm1b/train:text``.

What was prepared with ``file_format="array_record"`` can be read at any record, so a data set is listed as slices, and
an interrupted `prepare` goes on in the slice where it stopped.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

from meshgpt.data.blocks import Origin, record_blocks
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

    def __init__(self, source: str, records: Any, field: str, version: str, start: int, stop: int):
        self.name = self.location = f"{source}[{start}:{stop}]"
        self.size, self.version = stop - start, version
        self.earlier = version
        self._records_of, self._field, self._start, self._stop = records, field, start, stop

    def read(self, origin: Origin) -> Iterator[Piece]:
        digest = hashlib.sha256()
        return pieces(
            record_blocks(self._records(digest), origin, self._start + 1),
            origin,
            lambda block: block.spans[0].record - 1 - self._start,
            lambda: FileDigest(name=self.name, size=self.size, sha256=digest.hexdigest()),
        )

    def _records(self, digest: Any) -> Iterator[bytes | UserError]:
        for number in range(self._start, self._stop):
            try:
                value = self._records_of[number][self._field]
            except (ValueError, OSError, RuntimeError) as error:
                text = f"record {number + 1} of {self.name} cannot be read ({error}): build it again"
                if isinstance(error, OSError) and error.errno is not None:  # else of a damaged file
                    raise explained(error, text) from error
                raise UserError(text) from error
            data = value.encode() if isinstance(value, str) else value
            if isinstance(data, bytes):
                digest.update(len(data).to_bytes(8, "little") + data)
                yield data
            else:
                yield UserError(f"{self.name}:{number + 1}: field {self._field!r} is {type(value).__name__}, not text")


def list_inputs(source: str) -> list[Slice]:
    """The slices of ``tfds:NAME/SPLIT:FIELD``.

    Raises:
        UserError: misspelt, not built on this machine, in another format, or without that split or field.
    """
    rest, _, field = source.removeprefix(PREFIX).rpartition(":")
    name, _, split = rest.rpartition("/")
    if not (name and split and field):
        raise UserError(f"source {source!r} is not spelt {_SPELLING}")
    builder = _builder(source, name)
    if split not in builder.info.splits:
        raise UserError(f"source {source!r}: there is no split {split!r}, only {sorted(builder.info.splits)}")
    features = builder.info.features
    if features is None or field not in features:
        raise UserError(f"source {source!r}: there is no field {field!r}, only {sorted(features or ())}")
    try:
        records = builder.as_data_source(split=split)
    except (NotImplementedError, ValueError, OSError, AssertionError) as error:
        raise UserError(
            f"source {source!r} cannot be read at any record ({error}): build it with file_format='array_record'"
        ) from error
    about = builder.info.splits[split]
    version = f"{builder.info.full_name} {about.shard_lengths} {about.num_bytes}"
    count = len(records)
    if not count:
        raise UserError(f"source {source!r} is empty")
    starts = range(0, count, _SLICE)
    return [Slice(source, records, field, version, start, min(start + _SLICE, count)) for start in starts]


def _builder(source: str, name: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        if Path(name, "dataset_info.json").is_file():
            return tfds.builder_from_directory(name)
        return tfds.builder(name, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError, OSError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"source {source!r} is not there ({first}): spell it {_SPELLING}") from error
