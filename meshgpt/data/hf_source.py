"""Hugging Face data sets by name, streamed: ``hf:allenai/c4@en/train:text``. Needs `datasets` (extra `hf`).

Every shard of the data set is read on its own, so that an interrupted `prepare` goes on in the shard where it stopped.
A connection that breaks is tried again from the record where it broke.
"""

import hashlib
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any, final

from meshgpt.data.blocks import Origin, record_blocks
from meshgpt.data.pieces import Piece, pieces
from meshgpt.data.streams import FileDigest
from meshgpt.errors import MachineError, UserError, explained

PREFIX = "hf:"
_TRIES = 5
_WAIT_SECONDS = 1.0  # before the second try; twice as long before each that follows
_SPELLING = "hf:NAME/SPLIT:FIELD or hf:NAME@CONFIG/SPLIT:FIELD, such as hf:allenai/c4@en/train:text"


@final
class Shard:
    """One shard of a streamed data set; a `sources.Input`. Its size is not known, and counts as 1."""

    small = False
    earlier: str | None

    def __init__(self, source: str, dataset: Any, field: str, number: int):
        self.name = self.location = f"{source}[{number}]"
        self.size = 1
        self.version = self.earlier = str(getattr(dataset.info, "version", "") or "")
        self.earlier = self.version
        self._dataset, self._field, self._number = dataset, field, number

    def read(self, origin: Origin) -> Iterator[Piece]:
        digest = hashlib.sha256()
        return pieces(
            record_blocks(self._records(digest), origin),
            origin,
            lambda _: 0,
            lambda: FileDigest(name=self.name, size=self.size, sha256=digest.hexdigest()),
        )

    def _records(self, digest: Any) -> Iterator[bytes | UserError]:
        for number, row in enumerate(self._rows(), start=1):
            value = row.get(self._field)
            if isinstance(value, str):
                data = value.encode("utf-8", errors="surrogatepass")
                digest.update(len(data).to_bytes(8, "little") + data)
                yield data
            elif self._field not in row:
                yield UserError(f"{self.name}:{number} has no field {self._field!r}, only {sorted(row)}")
            else:
                yield UserError(f"{self.name}:{number}: field {self._field!r} is {type(value).__name__}, not text")

    def _rows(self) -> Iterator[dict[str, Any]]:
        done = tries = 0
        shard = self._dataset.shard(num_shards=self._dataset.num_shards, index=self._number)
        while True:
            try:
                for row in islice(shard, done, None):
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
    """The shards of ``hf:NAME[@CONFIG]/SPLIT:FIELD``.

    Raises:
        UserError: misspelt, or `datasets` is not installed.
        MachineError: not to be reached.
    """
    rest, _, field = source.removeprefix(PREFIX).rpartition(":")
    path, _, split = rest.rpartition("/")
    name, _, config = path.partition("@")
    if not (name and split and field):
        raise UserError(f"source {source!r} is not spelt {_SPELLING}")
    try:
        import datasets  # pyright: ignore[reportMissingImports] (extra hf)
    except ImportError as error:
        raise UserError(f"source {source!r} needs the package datasets: pip install 'meshgpt[hf]'") from error
    try:
        dataset = datasets.load_dataset(name, config or None, split=split, streaming=True)
        shards = int(dataset.num_shards)
    except (ValueError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        text = f"source {source!r} cannot be opened ({first}): spell it {_SPELLING}"
        raise (explained(error, text) if isinstance(error, OSError) else UserError(text)) from error
    return [Shard(source, dataset, field, number) for number in range(shards)]
