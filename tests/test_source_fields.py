"""Which text of a record is taken, slices of data sets, and other data behind the same name."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from meshgpt.data import fields
from meshgpt.data.prepare import Prepare, prepare
from meshgpt.data.sources import list_inputs
from meshgpt.data.store import Store
from meshgpt.data.tokenizer import train_bpe
from meshgpt.errors import UserError

OLD = Path(__file__).parent / "fixtures" / "before_rooms"
RECORDS = [
    {"doc": {"text": f"text {i}", "n": i}, "question": f"why {i}?", "answer": f"because of {i}", "n": i}
    for i in range(10)
]


def quiet(*_: object) -> None:
    """Shows no progress."""


def never(*progress: object) -> None:
    """The progress of what is ready."""
    raise AssertionError(progress)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["because of text " * 40], 270).save(folder)
    return folder


@pytest.fixture
def config(tokenizer_dir: Path, tmp_path: Path) -> Prepare:
    return Prepare(
        sources=("set in the test",),
        out=str(tmp_path / "store"),
        tokenizer=str(tokenizer_dir),
        val_fraction=0.0,
        workers=1,
    )


def texts_of(store: Store) -> list[str]:
    split, tokenizer = store.split("train"), store.tokenizer()
    return [tokenizer.decode(split.document_tokens(i)[:-1]) for i in range(split.num_documents)]


@pytest.fixture(params=["a.jsonl", "a.json", "a.parquet", "saved"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    path = tmp_path / request.param
    if request.param == "a.jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    elif request.param == "a.json":
        path.write_text(json.dumps(RECORDS))
    elif request.param == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    else:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list(RECORDS).save_to_disk(str(path))
    return str(path)


def test_nested_fields_and_templates(config: Prepare, source: str):
    asked = replace(config, sources=(source,))
    assert texts_of(prepare(replace(asked, field="doc.text"), quiet)) == [f"text {i}" for i in range(10)]
    template = replace(asked, template=r"{question}\n{{{answer}}} {doc.n}", out=config.out + "2")
    store = prepare(template, quiet)
    assert texts_of(store) == [f"why {i}?\n{{because of {i}}} {i}" for i in range(10)]
    assert store.index["prepare"]["field"] == r"{question}\n{{{answer}}} {doc.n}"
    assert prepare(template, never).digest == store.digest
    for field, message in {
        "doc.body": r"no (field|column) 'doc.body', only \['n', 'text'\]",
        "n": r":1: (field|column) 'n' is a int, not text",
        "body": r"no (field|column) 'body', only",
        "doc": r"'doc' is a dict, not text",
    }.items():
        with pytest.raises(UserError, match=message):
            prepare(replace(asked, field=field, out=config.out + "3"), quiet)
    with pytest.raises(UserError, match=r"no (field|column) 'why', only"):
        prepare(replace(asked, template="{why}", out=config.out + "4"), quiet)


@pytest.mark.parametrize("template", ["", "no field", "{", "{a}}", "{}", "{a{b}}"])
def test_templates_that_cannot_be(config: Prepare, template: str):
    with pytest.raises(UserError, match=re.escape(f"--template {template!r}")):
        replace(config, template=template)
    with pytest.raises(UserError, match=r"--field 'doc' and --template '\{a\}': give one of the two"):
        replace(config, template="{a}", field="doc")


def test_a_template_and_a_line_too_long_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from meshgpt.data.long_line import LongLine

    monkeypatch.setattr("meshgpt.data.long_line._LONG", 16)
    reader = LongLine("a:1", fields.template("{a} {b}"), "replace", tmp_path)
    reader.feed(json.dumps({"a": "x" * 90, "b": "y"}).encode())
    with pytest.raises(UserError, match="a:1 has a text too long for --template"):
        reader.finish()
    reader.close()


@pytest.fixture
def data_set(tmp_path: Path) -> tuple[Path, Callable[[str], None]]:
    pytest.importorskip("datasets")
    folder = tmp_path / "little"
    folder.mkdir()
    about = "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  splits:\n"
    (folder / "README.md").write_text(about + "  - name: train\n    num_bytes: 90\n    num_examples: 25\n---\n")

    def write(word: str) -> None:
        lines = [json.dumps({"text": f"{word} {i}"}) + "\n" for i in range(25)]
        (folder / "train.jsonl").write_text("".join(lines))

    write("text")
    return folder, write


def test_slices_are_those_of_datasets(config: Prepare, data_set: tuple[Path, Callable[[str], None]]):
    import datasets

    folder, _ = data_set
    for i, part in enumerate(("[:10%]", "[30%:70%]", "[3:7]", "[20:]", "[97%:]")):
        store = prepare(replace(config, sources=(f"hf:{folder}/train{part}:text",), out=f"{config.out}{i}"), quiet)
        expected = datasets.load_dataset("json", data_files=str(folder / "train.jsonl"), split=f"train{part}")
        assert texts_of(store) == expected["text"][:]
    with pytest.raises(UserError, match=r"the slice '1:2:3' is not spelt \[START:STOP\]"):
        prepare(replace(config, sources=(f"hf:{folder}/train[1:2:3]:text",)), quiet)
    (folder / "README.md").unlink()
    with pytest.raises(UserError, match=r"does not say how many rows it has.*such as \[:10000\]"):
        prepare(replace(config, sources=(f"hf:{folder}/train[:10%]:text",)), quiet)


def test_other_data_behind_the_name_of_a_hugging_face_data_set(
    config: Prepare, data_set: tuple[Path, Callable[[str], None]]
):
    folder, write = data_set
    asked = replace(config, sources=(f"hf:{folder}/train:text",))
    store = prepare(asked, quiet)
    assert prepare(asked, never).digest == store.digest
    _as_of_before(config.out, list_inputs(asked.sources, ()))
    assert prepare(asked, never).digest == store.digest
    prepare(replace(asked, overwrite=True, shard_tokens=99), quiet)
    write("word")
    with pytest.raises(UserError, match=r"source file hf:.*little/train:text\[0\] was added, removed or changed"):
        prepare(replace(asked, shard_tokens=99), quiet)
    again = prepare(replace(asked, overwrite=True), quiet)
    assert texts_of(again)[0] == "word 0"


def test_other_data_in_a_saved_folder(config: Prepare, tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "saved"
    asked = replace(config, sources=(str(path),))
    datasets.Dataset.from_list([{"text": "one"}]).save_to_disk(str(path))
    prepare(asked, quiet)
    shutil.rmtree(path)
    datasets.Dataset.from_list([{"text": "two"}]).save_to_disk(str(path))
    with pytest.raises(UserError, match="saved was added, removed or changed"):
        prepare(asked, quiet)
    assert texts_of(prepare(replace(asked, overwrite=True), quiet)) == ["two"]
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "three"}])})
    splits.save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(UserError, match=r"holds the splits \['train'\]: name one, such as .*splits/train"):
        prepare(replace(config, sources=(str(tmp_path / "splits"),)), quiet)
    named = replace(config, sources=(str(tmp_path / "splits" / "train"),), out=config.out + "2")
    assert texts_of(prepare(named, quiet)) == ["three"]


def _as_of_before(out: str, inputs: list) -> None:
    """Makes a store's request one of before requests had the reader."""
    path = Path(out) / "request.json"
    request = json.loads(path.read_text())
    del request["reader"]
    request["files"] = [[one.input.name, one.input.size, one.input.earlier] for one in inputs]
    path.write_text(json.dumps(request))


def test_a_store_of_before_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its text is gone; size and time of its file are as they were."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD / "store", "store")
    request = json.loads((OLD / "store" / "request.json").read_text())
    ((name, size, version),) = request["files"]
    Path(name).write_bytes(b" " * size)
    os.utime(name, ns=(int(version), int(version)))
    asked = Prepare(sources=(name,), out="store", train_tokenizer="bpe", vocab_size=272, val_fraction=0.2)
    assert prepare(asked, never).digest == Store.open(OLD / "store").digest
    os.utime(name, ns=(1, 1))
    with pytest.raises(UserError, match=r"source file text.jsonl was added, removed or changed.*--overwrite"):
        prepare(asked, quiet)


def test_a_folder_of_before_is_ready_though_more_would_be_read_now(config: Prepare, tmp_path: Path):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("text")
    asked = replace(config, sources=(str(folder),))
    store = prepare(asked, quiet)
    _as_of_before(config.out, list_inputs(asked.sources, asked.extensions))
    (folder / "B.TXT").write_text("not read then")
    assert prepare(asked, never).digest == store.digest
    (folder / "c.txt").write_text("new")
    with pytest.raises(UserError, match="was added, removed or changed"):
        prepare(asked, quiet)
