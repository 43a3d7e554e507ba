"""Every kind of source gives the same documents; lines too long for memory, bad records, duplicates."""

import gzip
import json
import lzma
import os
import subprocess
import sys
import sysconfig
import types
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshgpt.data import long_line
from meshgpt.data.long_line import LongLine
from meshgpt.data.prepare import Prepare, prepare
from meshgpt.data.store import Store
from meshgpt.data.tokenizer import train_bpe
from meshgpt.errors import MachineError, UserError

TEXTS = [
    path.read_text(encoding="utf-8") for path in sorted((Path(sysconfig.get_path("stdlib")) / "asyncio").glob("*.py"))
]


def quiet(*_: object) -> None:
    """Shows no progress."""


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(TEXTS[:5], 400).save(folder)
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


def names_of(store: Store) -> list[str]:
    split = store.split("train")
    return [split.document_name(i) for i in range(split.num_documents)]


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def test_xz(config: Prepare, tmp_path: Path):
    path = tmp_path / "a.jsonl.xz"
    data = json_lines(TEXTS)
    path.write_bytes(lzma.compress(data[:9000]) + lzma.compress(data[9000:]))
    assert texts_of(prepare(replace(config, sources=(str(path),)), quiet)) == TEXTS
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"a\.jsonl\.xz is damaged or cut short"):
        prepare(replace(config, sources=(str(path),), out=config.out + "2"), quiet)


@pytest.fixture
def bucket() -> Iterator[Any]:
    """A remote store of files, by fsspec's own in-memory one."""
    memory = fsspec.filesystem("memory")
    yield memory
    memory.rm("/bucket", recursive=True)


def test_remote_files_folders_and_globs(config: Prepare, bucket: Any):
    with bucket.open("/bucket/deep/a.jsonl.gz", "wb") as file:
        file.write(gzip.compress(json_lines(TEXTS[:6])))
    with bucket.open("/bucket/b.txt", "wb") as file:
        file.write(TEXTS[6].encode())
    with bucket.open("/bucket/skipped.bin", "wb") as file:
        file.write(b"\xff")
    cases = {
        "memory://bucket": [TEXTS[6], *TEXTS[:6]],
        "memory://bucket/*/*.jsonl.gz": TEXTS[:6],
        "memory://bucket/b.txt": [TEXTS[6]],
    }
    for i, (source, expected) in enumerate(cases.items()):
        store = prepare(replace(config, sources=(source,), out=config.out + str(i)), quiet)
        assert texts_of(store) == expected
        assert all(name.startswith("memory://") for name in names_of(store))
    for source in ("memory://bucket/no.txt", "memory://bucket/*.none"):
        with pytest.raises(UserError, match="does not exist"):
            prepare(replace(config, sources=(source,)), quiet)
    with pytest.raises(UserError, match=r"'nosuch://x'"):
        prepare(replace(config, sources=("nosuch://x",)), quiet)


def test_parquet(config: Prepare, tmp_path: Path):
    path = tmp_path / "shards" / "a.parquet"
    path.parent.mkdir()
    long = "many words " * 300_000
    table = pyarrow.table({"id": range(len(TEXTS) + 1), "body": [*TEXTS, long]})
    pyarrow.parquet.write_table(table, path, row_group_size=7, compression="zstd")
    asked = replace(config, sources=(str(path.parent),), field="body")
    store = prepare(asked, quiet)
    assert texts_of(store) == [*TEXTS, long]
    assert names_of(store)[4] == f"{path}:5"
    with pytest.raises(
        UserError, match=r"a\.parquet has no column 'text', only \['id', 'body'\]: name it with --field"
    ):
        prepare(replace(asked, field="text", out=config.out + "2"), quiet)
    with pytest.raises(UserError, match=r"a\.parquet:1: column 'id' is a int, not text"):
        prepare(replace(asked, field="id", out=config.out + "3"), quiet)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"a\.parquet is no parquet file, or a damaged one"):
        prepare(replace(asked, out=config.out + "4"), quiet)


def test_a_locally_built_tensorflow_data_set(config: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import tensorflow_datasets as tfds

    class Little(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"text": tfds.features.Text(), "id": tfds.features.Scalar(dtype=np.int64)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, text in enumerate(TEXTS):
                yield i, {"text": text, "id": i}

    Little(data_dir=str(tmp_path / "data"), file_format="array_record").download_and_prepare()
    monkeypatch.setattr("meshgpt.data.tfds_source._SLICE", 10)
    folder = tmp_path / "data" / "little" / "1.0.0"
    store = prepare(replace(config, sources=(f"tfds:{folder}/train:text",)), quiet)
    assert sorted(texts_of(store)) == sorted(TEXTS)
    assert names_of(store)[11] == f"tfds:{folder}/train:text[10:20]:12"
    assert "tensorflow" not in sys.modules
    few = prepare(replace(config, sources=(f"tfds:{folder}/train[:3]:text",), out=config.out + "2"), quiet)
    assert texts_of(few) == texts_of(store)[:3]
    for path in folder.glob("*.array_record*"):
        os.utime(path, ns=(1, 1))  # built again, with other text of the same length
    with pytest.raises(UserError, match="was added, removed or changed"):
        prepare(replace(config, sources=(f"tfds:{folder}/train:text",)), quiet)
    refused = {
        f"tfds:{folder}/test:text": r"there is no split 'test', only \['train'\]",
        f"tfds:{folder}/train:body": r"there is no field 'body', only \['id', 'text'\]",
        f"tfds:{folder}/train": "is not spelt tfds:NAME/SPLIT:FIELD",
        "tfds:no_such_thing/train:text": "is not there",
    }
    for source, message in refused.items():
        with pytest.raises(UserError, match=message):
            prepare(replace(config, sources=(source,)), quiet)


class FakeHub:
    """Stands for `datasets`: streams in two shards, and breaks off when told."""

    def __init__(self, breaks: int):
        self.breaks = breaks
        self.num_shards = 2
        self.info = types.SimpleNamespace(version="1.2.3")
        self.asked: list[tuple] = []

    def load_dataset(self, name: str, config: str | None, *, split: str, streaming: bool) -> "FakeHub":
        self.asked.append((name, config, split, streaming))
        if name == "no/such":
            raise ValueError("Dataset 'no/such' doesn't exist on the Hub")
        return self

    def shard(self, num_shards: int, index: int) -> "FakeShard":
        return FakeShard(self, TEXTS[index::num_shards])


class FakeShard:
    def __init__(self, hub: FakeHub, texts: list[str]):
        self._hub, self._texts = hub, texts

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for i, text in enumerate(self._texts):
            if i == 3 and self._hub.breaks:
                self._hub.breaks -= 1
                raise ConnectionError("reset by peer")
            yield {"content": text}


def test_a_hugging_face_data_set(config: Prepare, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("meshgpt.data.hf_source._WAIT_SECONDS", 0.0)
    asked = replace(config, sources=("hf:some/set@en/train:content",))
    hub = FakeHub(breaks=4)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    store = prepare(asked, quiet)
    assert texts_of(store) == [*TEXTS[0::2], *TEXTS[1::2]]
    assert hub.asked[0] == ("some/set", "en", "train", True)
    assert names_of(store)[1] == "hf:some/set@en/train:content[0]:2"
    monkeypatch.setitem(sys.modules, "datasets", FakeHub(breaks=5))
    with pytest.raises(MachineError, match=r"broke off 5 times at record 4 \(reset by peer\): run the same"):
        prepare(replace(asked, out=config.out + "2"), quiet)
    with pytest.raises(UserError, match=r"\[0\]:1 has no field 'text', only \['content'\]"):
        prepare(replace(asked, sources=("hf:some/set/train:text",), out=config.out + "3"), quiet)
    with pytest.raises(UserError, match="doesn't exist on the Hub"):
        prepare(replace(asked, sources=("hf:no/such/train:text",)), quiet)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'meshgpt\[hf\]'"):
        prepare(asked, quiet)


def test_bad_records_are_counted_and_shown(config: Prepare, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    bad = [b'{"text": ', b"[]", b'{"content": 1}', b'{"text": null}', b'{"text": "\xff"}', b"{", b"}"]
    path.write_bytes(json_lines(TEXTS[:3]) + b"\n".join(bad) + b"\n" + json_lines(TEXTS[3:]))
    asked = replace(config, sources=(str(path),), on_invalid_utf8="error")
    with pytest.raises(UserError, match=r"a\.jsonl:4 is not valid JSON"):
        prepare(asked, quiet)
    skipping = replace(asked, bad_records="skip", out=config.out + "2")
    store = prepare(skipping, quiet)
    assert texts_of(store) == TEXTS
    counts = store.index["counts"]
    assert counts["bad_records"] == 7
    assert [message.split(" ")[0] for message in counts["first_bad"]] == [
        f"{path}:4", f"{path}:5", f"{path}:6", f"{path}:7:", f"{path}:8",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"7 bad records are more than --max-bad-records 6. The first: .*a\.jsonl:4 is"):
        prepare(replace(skipping, max_bad_records=6, out=config.out + "3"), quiet)
    assert texts_of(prepare(replace(skipping, max_bad_records=7, out=config.out + "4"), quiet)) == TEXTS


def test_duplicates_are_dropped_and_counted(config: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("meshgpt.data.prepare._COMMIT_SECONDS", 0.0)
    long = "".join(TEXTS) * 4
    assert len(long) > 1 << 20
    folder = tmp_path / "text"
    folder.mkdir()
    for name, texts in {"a": TEXTS[:8], "b": [*TEXTS[4:12], TEXTS[4]]}.items():
        (folder / f"{name}.jsonl").write_bytes(json_lines(texts))
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(long)
    asked = replace(config, sources=(str(folder),), extensions=(".jsonl", ".txt"), deduplicate=True, val_fraction=0.3)
    seen: list[int] = []

    def interrupt(*_: object) -> None:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(asked, interrupt)
    store = prepare(asked, quiet)
    expected = {*TEXTS[:12], long}
    found = []
    for split in (store.split("train"), store.split("val")):
        tokenizer = store.tokenizer()
        found += [tokenizer.decode(split.document_tokens(i)[:-1]) for i in range(split.num_documents)]
        assert split.num_documents > 1
        assert split.num_bytes == split.documents["bytes"].sum()
    assert sorted(found) == sorted(expected)
    repeated = [*TEXTS[4:8], TEXTS[4], long]
    assert store.index["counts"]["duplicates"] == len(repeated)
    assert store.index["counts"]["duplicate_bytes"] == sum(len(text.encode()) for text in repeated)
    whole = prepare(replace(asked, out=config.out + "2"), quiet)
    assert store.digest == whole.digest


JSON_TEXT = st.text(max_size=40) | st.text('\\"u\x00\né\u20ac\U0001f600 aD8', max_size=60)


@given(
    text=JSON_TEXT, other=JSON_TEXT, ascii_only=st.booleans(), data=st.data(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_a_line_in_pieces_is_what_json_makes_of_it(
    tmp_path_factory: pytest.TempPathFactory, text: str, other: str, ascii_only: bool, data: st.DataObject
):
    line = json.dumps({"a": [other, {"text": "no"}], "text": text, other + "k": 1.5}, ensure_ascii=ascii_only).encode(
        "utf-8", errors="surrogatepass"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_line, "_LONG", data.draw(st.integers(8, 30)))
        reader = LongLine("a:1", "text", "replace", Path(tmp_path_factory.getbasetemp()))
        size = data.draw(st.integers(1, 12))
        for start in range(0, len(line), size):
            reader.feed(line[start : start + size])
        got, spool = reader.finish()
    if spool is not None:
        spool.seek(0)
        got = spool.read().decode()
    reader.close()
    assert got == text.encode("utf-8", errors="surrogatepass").decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "' + b"x" * 90 + b'\\q ......"}', "bad escape or control character"),
        (b'{"text": "' + b"x" * 90 + b'\n"}', "bad escape or control character"),
        (b'{"text": "' + b"x" * 90, "ends within a string"),
        (b'{"text": "' + b"x" * 90 + b'"', "not valid JSON"),
        (b'{"text": ["' + b"x" * 90 + b'"]}', "field 'text' is a list"),
        (b'{"body": "' + b"x" * 90 + b'"}', "has no field 'text'"),
    ],
)
def test_a_long_line_that_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, message: str):
    monkeypatch.setattr(long_line, "_LONG", 16)

    def read() -> None:
        with closing(LongLine("a:1", "text", "replace", tmp_path)) as reader:
            for start in range(0, len(line), 7):
                reader.feed(line[start : start + 7])
            reader.finish()

    with pytest.raises(UserError, match=message):
        read()


MEASURE = """
import resource
import sys
from meshgpt.data.blocks import Origin, json_blocks
from pathlib import Path
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
origin = Origin(file=0, name="a", held_out=False, field="text", on_invalid_utf8="error", scratch=Path(sys.argv[2]))
sizes = [(block.kind, len(block.payload)) for block in json_blocks(open(sys.argv[1], "rb"), origin)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, len(sizes), max(size for _, size in sizes))
"""


def test_a_line_far_larger_than_memory_allows(config: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same code reads 5 GB; here 120 MB go through in less than 70."""
    part = json.dumps("a line of words, \u00e9\u20ac\U0001f600\n" * 1000)[1:-1].encode()
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.write(b'{"text": "short"}\n{"meta": [1, "x"], "text": "')
        while file.tell() < 120 << 20:
            file.write(part)
        file.write(b'"}\n{"text": "after"}\n')
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "a.jsonl"), str(tmp_path)]
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin"}
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert int(out[0]) < 70 << 10  # KiB
    assert int(out[1]) > 50
    assert int(out[2]) < 2 << 20
    (tmp_path / "a.jsonl").unlink()
    monkeypatch.setattr("meshgpt.data.blocks.LONG_LINE_BYTES", 1 << 20)
    texts = ["short", "words, \u00e9\u20ac\n" * 300_000, "after", "x" * (3 << 20), "end"]
    broken = b'{"text": "' + b"y" * (3 << 20) + b'\n{"text": "still there"}\n'
    (tmp_path / "b.jsonl").write_bytes(json_lines(texts[:3]) + broken + json_lines(texts[3:]))
    store = prepare(replace(config, sources=(str(tmp_path / "b.jsonl"),), bad_records="skip"), quiet)
    assert texts_of(store) == [*texts[:3], "still there", *texts[3:]]
    assert names_of(store) == [f"{tmp_path / 'b.jsonl'}:{line}" for line in (1, 2, 3, 5, 6, 7)]
    assert store.index["counts"]["bad_records"] == 1
