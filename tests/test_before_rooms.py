"""A run folder of before the package was cut into rooms: today's code reads it and goes on with it to its end.

What the rest of the run measures is compared with what the code of then did (tests/fixtures/before_rooms/README.md).
"""

import dataclasses
import json
from pathlib import Path

import pytest
import runs

from meshgpt.data.store import Store
from meshgpt.data.tokenizer import load_tokenizer
from meshgpt.training.loop import train
from meshgpt.training.run_folder import RunFolder

OLD = Path(__file__).parent / "fixtures" / "before_rooms"


def test_it_goes_on_to_its_end_as_it_would_have(tmp_path: Path, workshop: runs.Workshop) -> None:
    folder, store = runs.copied(OLD / "run", tmp_path / "run"), runs.copied(OLD / "store", tmp_path / "store")
    before = runs.rows(folder)
    assert [row["step"] for row in before] == [1, 2, 3, 4, 5]
    run = RunFolder(folder).read_run()
    run = dataclasses.replace(run, run_dir=str(folder), data=dataclasses.replace(run.data, store=str(store)))
    with workshop.cached():
        train(run)
    rows, expected = runs.rows(folder), json.loads((OLD / "expected.json").read_text(encoding="utf-8"))
    assert rows[:5] == before
    assert len(rows) == len(expected) == 60
    for row, wanted in zip(rows, expected, strict=True):
        # On other devices sums are in another order.
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=1e-3)
    assert RunFolder(folder).finished_step() == 60
    assert (folder / "export" / "model.safetensors").is_file()


def test_its_token_store_and_tokenizer_open(tmp_path: Path) -> None:
    store = Store.open(runs.copied(OLD / "store", tmp_path / "store"))
    store.verify()
    tokenizer = store.tokenizer()
    assert load_tokenizer(OLD / "run" / "tokenizer").fingerprint == tokenizer.fingerprint
    for name, documents in (("train", 24), ("val", 6)):
        split = store.split(name)
        assert split.num_documents == documents
        for number in range(documents):
            ids = [int(token) for token in split.document_tokens(number) if token != store.eot_id]
            assert tokenizer.encode(tokenizer.decode(ids)) == ids
