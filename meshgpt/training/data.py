"""The data of a run: its stores opened, its batches, its held-out text, and the record that tells them apart later."""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshgpt.atomic import write_atomically
from meshgpt.config import Run
from meshgpt.data.batch_sizes import BatchSizes
from meshgpt.data.mixture import Schedule, Source, Stage, check_stages
from meshgpt.data.pipeline import Batches, EvalBatches
from meshgpt.data.prepare import StoreDiffersError, prepare
from meshgpt.data.records import Packed, Records, Sequences
from meshgpt.data.store import INDEX, Store
from meshgpt.data.tokenizer import Tokenizer
from meshgpt.errors import UserError
from meshgpt.settings import json_text
from meshgpt.training.run_folder import RunFolder
from meshgpt.training.trackers import progress_bar


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run reads.

    Attributes:
        stores: by source name; the name is empty where the run has a single store.
        batches: of the training text.
        validation: of the held-out text of all stores; None where there is none.
    """

    stores: dict[str, Store]
    batches: Batches
    validation: EvalBatches | None

    @property
    def first_store(self) -> Store:
        return next(iter(self.stores.values()))

    def tokenizer(self) -> Tokenizer:
        """The one that made the stores."""
        return self.first_store.tokenizer()

    def document_end(self, run: Run) -> int | None:
        """The id at which attention has to stop; None where it need not."""
        return self.first_store.eot_id if run.data.mask_documents else None

    def record(self) -> list[dict[str, str]]:
        """What has to stay as it is for a run to go on: kept beside checkpoints, checked by `check_unchanged`."""
        first_step = self.batches.digest(0)
        return [
            {
                "name": name,
                "store": str(store.folder.resolve()),
                "digest": store.digest,
                "records": records.digest,
                "first_step": first_step,
            }
            for (name, store), records in zip(self.stores.items(), self.batches.sources, strict=True)
        ]

    def check_unchanged(self, recorded: Any, since: str) -> None:
        """Raises UserError where the data are not those of `recorded`, an earlier `record()` from `since`."""
        remedy = "give another --run-dir, or --resume never to start afresh (the old run is set aside)"
        before = {row["name"]: row for row in recorded}
        for row in self.record():
            held = before.get(row["name"])
            if held is None:
                raise UserError(f"the source {row['name']!r} was not there at {since}: {remedy}")
            for what, said in (("digest", "tokens"), ("records", "packing")):
                if held[what] != row[what]:
                    raise UserError(
                        f"the store {row['store']} has other {said} than the run had at {since} (digest then "
                        f"{held[what][:12]}, now {row[what][:12]}): give the store it was trained on (then at "
                        f"{held['store']}); or {remedy}"
                    )
        if any(row["first_step"] != before[row["name"]]["first_step"] for row in self.record()):
            raise UserError(
                f"this version of meshgpt puts the run's data into another order than at {since}: go on with the "
                f"version that run.json names; or {remedy}"
            )

    def write_ledger(self, path: Path) -> None:
        """The record as a file, for those who come back a year later, and what losses of runs are compared by.

        `tokenizer` is the fingerprint of a store's, `held_out` the documents, bytes and gzipped bytes of its held-out
        text, which are those of the text whatever the tokenizer.
        """
        rows = []
        for row, store in zip(self.record(), self.stores.values(), strict=True):
            val = store.split("val")
            text = f"{val.num_documents} documents, {val.num_bytes} bytes, {val.gzip_bytes} of {val.gzip_of} gzipped"
            rows.append(row | {"tokenizer": store.fingerprint, "held_out": text})
        write_atomically(path, json_text(rows, indent=1) + "\n")


def open_run_data(run: Run, folder: RunFolder, sizes: BatchSizes | None = None) -> RunData:
    """Opens (or first prepares) what a run reads; `sizes` are its batches' where these changed on the way.

    Raises:
        UserError: no data, a store that is missing, damaged or made with another tokenizer, one that has more token
            ids than the model, or a mixture that the run cannot have.
    """
    stages = run.data.mixture or (Stage(sources=(Source(store=_single_store(run, folder), max_epochs=0.0),)),)
    check_stages(stages)
    sources = {source.label: source for stage in stages for source in stage.sources}
    stores = {name: Store.open(source.store) for name, source in sources.items()}
    check_tokenizers(list(stores.values()))
    check_vocabulary(stores, run)
    records = tuple(_cut(run, store) for store in stores.values())
    sizes = sizes or BatchSizes.constant(run.global_batch)
    schedule = Schedule(
        stages,
        tuple(sources),
        [store.split("train").num_tokens for store in stores.values()],
        [len(one) for one in records],
        sizes,
    )
    schedule.check(sizes.before(run.last_step))
    if not run.data.mixture:
        stores = {"": next(iter(stores.values()))}  # nameless: it may move without changing the order
    held_out = tuple(store.split("val") for store in stores.values())
    micro = run.global_batch // run.accumulate
    validation = None
    if any(split.num_tokens for split in held_out):
        validation = EvalBatches(splits=held_out, seq_len=run.sequence_length, global_batch=micro)
    return RunData(
        stores=stores,
        batches=Batches(sources=records, names=tuple(stores), schedule=schedule, seed=run.seed, sizes=sizes),
        validation=validation,
    )


def without_preparing(run: Run, folder: RunFolder) -> Run:
    """The same run for a process that finds the store prepared, by process 0."""
    if run.data.prepare is None or run.data.store or run.data.mixture:
        return run
    store = run.data.prepare.out or str(folder.data)
    return dataclasses.replace(run, data=dataclasses.replace(run.data, store=store, prepare=None))


def _cut(run: Run, store: Store) -> Records:
    if run.data.packing == "best_fit":
        return Packed(store, store.split("train"), run.sequence_length)
    return Sequences(store.split("train"), run.sequence_length)


def _single_store(run: Run, folder: RunFolder) -> str:
    if run.data.store:
        return run.data.store
    if run.data.prepare is None:
        raise UserError(
            "no data: give --data.store FOLDER, made by `meshgpt prepare`, or a recipe with data.prepare or .mixture"
        )
    request = run.data.prepare
    request = request if request.out else dataclasses.replace(request, out=str(folder.data))
    try:
        with progress_bar() as report:
            return str(prepare(request, report).folder)
    except StoreDiffersError as error:
        finished = (Path(request.out) / INDEX).exists()
        keep = f"train on the store as it is with --data.store {request.out}, or " if finished else ""
        raise UserError(
            f"the run's text is not what {request.out} was prepared from: {error.difference}. So it is after "
            f"an upgrade of Python, where the text is its standard library. Either {keep}start afresh on today's "
            "text with --data.prepare.overwrite --resume never (an old run is set aside)"
        ) from error
    except UserError as error:  # it names the flags of `meshgpt prepare`, which are longer here
        raise UserError(re.sub(r"(?<!\S)--(?=[a-z])", "--data.prepare.", str(error))) from error


def check_tokenizers(stores: list[Store]) -> None:
    """Raises UserError for two stores whose tokenizers differ."""
    for store in stores[1:]:
        store.check_tokenizer(stores[0].tokenizer(), f"{stores[0].folder}, which this run reads too,")


def check_vocabulary(stores: dict[str, Store], run: Run) -> None:
    """Raises UserError for a store with token ids that the model does not have."""
    for store in stores.values():
        if store.vocab_size > run.model.vocab_size:
            raise UserError(
                f"the store {store.folder} has {store.vocab_size} token ids and the model {run.model.vocab_size}: "
                f"give --model.vocab-size {store.vocab_size}"
            )


def open_run(path: Path) -> tuple[Run, RunData]:
    """A run and its data, which have to be those it was trained on.

    Raises:
        UserError: no run there, or its stores are gone or others now.
    """
    folder = RunFolder(path)
    run = folder.read_run()
    if not folder.ledger.is_file():
        raise UserError(f"{path} has not begun to train: there is no {folder.ledger.name} in it")
    recorded = json.loads(folder.ledger.read_text(encoding="utf-8"))
    if not run.data.mixture:
        store = folder.data if (folder.data / INDEX).is_file() else recorded[0]["store"]  # the run may have moved
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, store=str(store), prepare=None))
    opened = open_run_data(run, folder, folder.batch_sizes())
    opened.check_unchanged(recorded, "its last start")
    return run, opened
