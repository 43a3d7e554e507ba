"""Hugging Face data sets by name, streamed: ``hf:allenai/c4@en/train:text``. Needs `datasets` (extra `hf`).

Every shard of the data set is read on its own, so that an interrupted `prepare` goes on in the shard where it stopped.
A connection that breaks is tried again from the record where it broke.
"""

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, final

from meshgpt.data import fields
from meshgpt.data.blocks import Origin, record_blocks
from meshgpt.data.failures import BadInputError
from meshgpt.data.pieces import Piece, pieces
from meshgpt.data.streams import FileDigest
from meshgpt.errors import MachineError, UserError, explained

PREFIX = "hf:"
_TRIES = 5
_WAIT_SECONDS = 1.0  # before the second try; twice as long before each that follows
_SPELLING = "hf:NAME/SPLIT:FIELD or hf:NAME@CONFIG/SPLIT:FIELD, such as hf:allenai/c4@en/train:text or train[:10%]:text"


@final
class Shard:
    """One shard of a streamed data set; a `sources.Input`. Its size is not known, and counts as 1."""

    small = False
    earlier: str | None

    def __init__(self, source: str, dataset: Any, field: str, number: int | None, version: str, rows: range):
        self.name = self.location = source if number is None else f"{source}[{number}]"
        self.size = 1
        self.earlier = str(getattr(dataset.info, "version", "") or "")
        self.version = f"{self.earlier} {version}" if version else self.earlier
        self._dataset, self._field, self._number, self._range = dataset, field, number, rows

    def read(self, origin: Origin) -> Iterator[Piece]:
        digest = hashlib.sha256()
        return pieces(
            record_blocks(self._records(origin, digest), origin),
            origin,
            lambda _: 0,
            lambda: FileDigest(name=self.name, size=self.size, sha256=digest.hexdigest()),
        )

    def _records(self, origin: Origin, digest: Any) -> Iterator[bytes | UserError]:
        take = fields.ids_of if origin.token_ids else fields.bytes_of
        for number, row in enumerate(self._rows(), start=1):
            try:
                data = take(row, self._field, f"{self.name}:{number}")
            except BadInputError as error:
                yield error
            else:
                digest.update(len(data).to_bytes(8, "little") + data)
                yield data

    def _rows(self) -> Iterator[dict[str, Any]]:
        done = tries = 0
        shard = self._dataset
        if self._number is not None:
            shard = shard.shard(num_shards=shard.num_shards, index=self._number)
        while True:
            try:
                for row in islice(shard, self._range.start + done, self._range.stop):
                    yield row
                    done, tries = done + 1, 0
                return
            except OSError as error:  # every network error of requests, httpx's aside, and of fsspec is one
                tries += 1
                if tries == _TRIES:
                    raise MachineError(
                        f"{self.name} broke off {_TRIES} times at record {done + 1} ({error}): run the same command "
                        "again when the network is well; what is done is kept"
                    ) from error
                time.sleep(_WAIT_SECONDS * 2 ** (tries - 1))


def list_inputs(source: str) -> list[Shard]:
    """The shards of ``hf:NAME[@CONFIG]/SPLIT:FIELD``, or its rows where SPLIT is a slice.

    Raises:
        UserError: misspelt, or `datasets` is not installed.
        MachineError: not to be reached.
    """
    path, split, part, field = named(source, PREFIX, _SPELLING)
    name, _, config = path.partition("@")
    try:
        import datasets  # pyright: ignore[reportMissingImports] (extra hf)
    except ImportError as error:
        raise UserError(f"source {source!r} needs the package datasets: pip install 'meshgpt[hf]'") from error
    try:
        dataset: Any = datasets.load_dataset(name, config or None, split=split, streaming=True)
        version = _fingerprint(datasets, name, config, split)
        shards = int(dataset.num_shards)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        text = f"source {source!r} cannot be opened ({first}): spell it {_SPELLING}"
        raise (explained(error, text) if isinstance(error, OSError) else UserError(text)) from error
    if part:
        rows = _slice(source, part, lambda: dataset.info.splits[split].num_examples)
        return [Shard(source, dataset, field, None, version, rows)]
    return [Shard(source, dataset, field, number, version, range(sys.maxsize)) for number in range(shards)]


def named(source: str, prefix: str, spelling: str) -> tuple[str, str, str, str]:
    """Name, split, the slice of it (such as ``:10%``) and field, which may be a template, of a data set.

    Raises:
        UserError: it is spelt otherwise.
    """
    found = re.fullmatch(r"(.+)/([^/:\[\]]+)(?:\[([^\]]*)\])?:(.+)", source.removeprefix(prefix), re.DOTALL)
    if found is None:
        raise UserError(f"source {source!r} is not spelt {spelling}")
    path, split, part, field = found.groups()
    return path, split, part or "", fields.template(field) if "{" in field else field


def _slice(source: str, part: str, count: Callable[[], int | None]) -> range:
    """Rows of a slice, rounded as `datasets` does."""
    found = re.fullmatch(r"(\d+)?(%)?:(\d+)?(%)?", part)
    if found is None:
        raise UserError(f"source {source!r}: the slice {part!r} is not spelt [START:STOP], in rows or in %")
    percent = "%" in part
    try:
        total = count() if percent else None
    except (TypeError, KeyError):
        total = None
    if percent and total is None:
        raise UserError(
            f"source {source!r}: the data set does not say how many rows it has, so that {part!r} of them cannot be "
            "told: give the slice in rows, such as [:10000]"
        )

    def row(value: str | None, sign: str | None, default: int) -> int:
        return default if value is None else round(int(value) * (total or 0) / 100) if sign else int(value)

    return range(row(found[1], found[2], 0), row(found[3], found[4], sys.maxsize))


def _fingerprint(datasets: Any, name: str, config: str, split: str) -> str:
    """A digest of the data's files as `datasets` tells them apart: commit, ETag or time of change."""
    if not hasattr(datasets, "load_dataset_builder"):
        return ""
    files = datasets.load_dataset_builder(name, config or None).config.data_files
    if not files:
        return ""
    chosen = {split: files[split]} if split in files else files
    told = [[key, [*map(str, some)], [*map(list, some.origin_metadata)]] for key, some in sorted(chosen.items())]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
