"""The corpus of odd inputs: each is read as other programs read it, or named with a remedy."""

import gc
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import odd_inputs
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from odd_inputs import TEXTS

from meshgpt.data import json_values as cutting
from meshgpt.data import worker
from meshgpt.data.documents import Rules, documents
from meshgpt.data.prepare import TEXT_EXTENSIONS, Prepare, prepare
from meshgpt.data.sources import Reading, list_inputs, read_blocks
from meshgpt.data.store import Store
from meshgpt.data.tokenizer import train_bpe
from meshgpt.data.unread import Unread, told
from meshgpt.errors import UserError

HALF = "half \ufffd\ufffd\ufffd"  # one for each byte
ROOT = Path(__file__).parents[1]


def quiet(*_: object) -> None:
    """Shows no progress."""


@dataclass
class Found:
    """What reading sources gave."""

    texts: list[str]
    bad: list[str]
    unread: Unread


def read(
    scratch: Path,
    *sources: object,
    bad_records: Literal["error", "skip"] = "error",
    extensions: tuple[str, ...] = TEXT_EXTENSIONS,
) -> Found:
    """Reads sources in this process, as `prepare` and its workers do."""
    rules = Rules(field="text", on_invalid_utf8="replace", bad_records=bad_records, val_fraction=0.0)
    found = Found([], [], Unread())
    listed = list_inputs([str(source) for source in sources], extensions, unread=found.unread)
    parts: list[str] = []
    finished = 0
    for block in read_blocks(listed, Reading(field="text", on_invalid_utf8="replace", scratch=scratch)):
        finished += len(block.finished)
        for document in documents(block.block, rules, found.bad):
            parts.append(document.text)
            if block.block.fragment is None or block.block.fragment.closes:
                found.texts.append("".join(parts))
                parts = []
    assert finished == len(listed)
    assert not parts
    return found


@pytest.fixture
def odd_folder(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """`odd_inputs.odd_folder`; pytest could not remove it, so deep is it."""
    reasons = odd_inputs.odd_folder(tmp_path / "folder")
    yield tmp_path / "folder", reasons
    subprocess.run(["rm", "-rf", str(tmp_path / "folder")], check=True)


@pytest.mark.parametrize("name", odd_inputs.readable())
def test_it_is_read_as_other_programs_read_it(tmp_path: Path, name: str):
    data, texts = odd_inputs.readable()[name]
    (tmp_path / name).write_bytes(data)
    found = read(tmp_path, tmp_path / name)
    assert found.texts == texts
    assert not list(Path(tempfile_folder()).glob("*escape.txt"))
    if "many" in name:
        named = {told_name for _, names in found.unread.reasons.values() for told_name in names}
        expected = odd_inputs.MEMBERS_NOT_READ | ({"link.txt", "pipe.txt"} if "zip" not in name else set())
        assert named == {f"{tmp_path / name}/{member}" for member in expected}


def tempfile_folder() -> str:
    return os.environ.get("TMPDIR", "/tmp")


@pytest.mark.parametrize("name", odd_inputs.refused())
def test_it_is_refused_by_name_or_counted(tmp_path: Path, name: str):
    data, message, texts = odd_inputs.refused()[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as raised:
        read(tmp_path, tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)
    found = read(tmp_path, tmp_path / name, bad_records="skip")
    assert found.texts == texts
    assert str(raised.value) == found.bad[0]
    assert len(found.bad) <= (2 if name == "cut.tgz" else 1)  # a member, and what would have followed it


@given(data=st.data())
@hypothesis_settings(max_examples=100, deadline=None)
def test_values_are_those_of_json(data: st.DataObject):
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=6) | st.text('\\"{}[],', max_size=6),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('"a}', max_size=3), inner, max_size=3),
        max_leaves=8,
    )
    records = data.draw(st.lists(st.dictionaries(st.text(max_size=3), values, max_size=3), max_size=4))
    indent = data.draw(st.sampled_from([None, 0, 2]))
    array = data.draw(st.booleans())
    spelled = json.dumps(records, indent=indent) if array else " ".join(json.dumps(r, indent=indent) for r in records)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "_CHUNK_BYTES", data.draw(st.integers(1, 9)))
        found, part = [], b""
        for piece, ends in cutting.json_values(io.BytesIO(spelled.encode()), "x"):
            part += piece
            if ends:
                found.append(json.loads(part))
                part = b""
    assert found == records


def test_a_value_that_is_too_long_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("meshgpt.data.blocks.LONG_LINE_BYTES", 1 << 20)
    long = "long \u20ac, \\ ]} " * 300_000
    records = [{"text": "a"}, {"n": 1, "text": long}, {"text": "b"}, {"text": "half \ud83d"}]
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1))
    assert read(tmp_path, tmp_path / "a.json").texts == ["a", long, "b", HALF]
    # Half a pair beside a long text, where the wanted one is short.
    lone = b'{"other": "%s", "text": "half \\ud83d"}' % (b"y" * (3 << 20))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a"}\n' + lone + b"\n")
    assert read(tmp_path, tmp_path / "b.jsonl").texts == ["a", HALF]


def test_every_file_of_a_folder_is_read_or_named(
    tmp_path: Path, odd_folder: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
):
    folder, reasons = odd_folder
    found = read(tmp_path, folder)
    assert sorted(found.texts) == sorted(odd_inputs.ODD_FOLDER_TEXTS)
    named = {name: why for why, (_, names) in found.unread.reasons.items() for name in names}
    assert {name: named[str(folder / name)].split(":")[0].split(",")[0] for name in reasons} == {
        name: why.split(",")[0] for name, why in reasons.items()
    }
    assert len(named) == len(reasons) == sum(count for count, _ in found.unread.reasons.values())
    real = os.scandir

    def closed(path: str):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", closed)
        patch.setattr(os, "access", lambda path, mode: not str(path).endswith("a.txt"))
        found = read(tmp_path, folder)
    assert "read" not in found.texts
    assert "read too" not in found.texts
    assert f"1 not read (a folder that cannot be opened: Permission denied): {folder}/sub" in told(
        found.unread.record()
    )
    assert f"1 not read (no right to read it): {folder}/a.txt" in told(found.unread.record())


@pytest.mark.usefixtures("odd_folder")
def test_what_is_named_itself_is_refused_with_a_remedy(tmp_path: Path):
    for name, message in {
        "pipe.txt": "a pipe, socket or device: pass its text on standard input",
        "nowhere.txt": "a link that leads nowhere",
        "itself.txt": "a link that leads nowhere",
        "gone.txt": "does not exist",
    }.items():
        with pytest.raises(UserError, match=message):
            read(tmp_path, tmp_path / "folder" / name)
    found = read(tmp_path, tmp_path / "folder" / "*")
    assert {why.split(":")[0] for why in found.unread.reasons} == {
        "a folder that a pattern matches", "a link that leads nowhere", "a pipe, socket or device",
    }  # fmt: skip
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=r"holds no file ending in .*1 not read \(another ending.*picture.png"):
        read(tmp_path, tmp_path / "empty")


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["some words of text " * 40], 270).save(folder)
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


def texts_of(store: Store, name: str = "train") -> list[str]:
    split, tokenizer = store.split(name), store.tokenizer()
    return [tokenizer.decode(split.document_tokens(i)[:-1]) for i in range(split.num_documents)]


def test_a_store_within_its_source(config: Prepare, tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.txt").write_text("text")
    with open(os.fsencode(folder) + b"/caf\xe9.txt", "wb") as file:
        file.write(b"a name in Latin-1")
    asked = replace(config, sources=(str(folder),), out=str(folder / "store"))
    store = prepare(asked, quiet)
    assert sorted(texts_of(store)) == ["a name in Latin-1", "text"]
    assert store.split("train").document_name(1) == f"{folder}/caf\\xe9.txt"
    assert "not_read" not in store.index
    assert prepare(asked, quiet).digest == store.digest
    other = prepare(replace(asked, out=str(folder / "other")), quiet)
    assert other.index["not_read"] == {"a token store": {"count": 1, "first": [f"{folder}/store"]}}
    with pytest.raises(UserError, match="is the folder of a token store: name the folder of its text"):
        prepare(replace(config, sources=(str(folder / "store"),)), quiet)


def test_standard_input(config: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    piped = replace(config, sources=("-",))

    def pipe(data: bytes, terminal: bool = False) -> None:
        stream = io.BytesIO(data)
        monkeypatch.setattr(stream := io.TextIOWrapper(stream), "isatty", lambda: terminal)
        monkeypatch.setattr(sys, "stdin", stream)

    packed = odd_inputs.PACK[".gz"](odd_inputs.lines())
    pipe(packed)
    store = prepare(piped, quiet)
    assert texts_of(store) == TEXTS
    assert store.split("train").document_name(0) == "standard input.gz:1"
    pipe(packed)
    assert prepare(piped, lambda *_: pytest.fail("it was ready")).digest == store.digest
    pipe(b"other text")
    with pytest.raises(UserError, match="source file standard input was added, removed or changed"):
        prepare(piped, quiet)
    pipe(b"other text")
    assert texts_of(prepare(replace(piped, overwrite=True), quiet)) == ["other text"]
    pipe(b"", terminal=True)
    with pytest.raises(UserError, match="which is a terminal: pipe a text into it"):
        prepare(piped, quiet)
    gc.collect()
    assert not list(tmp_path.glob("meshgpt-standard-input-*"))


@pytest.mark.usefixtures("odd_folder")
def test_the_command_reads_standard_input_and_says_what_it_does_not_read(config: Prepare, tmp_path: Path):
    command = [sys.executable, "-m", "meshgpt", "prepare", "-", str(tmp_path / "folder"), "--tokenizer"]
    command += [str(config.tokenizer), "--out", config.out, "--val-fraction", "0", "--workers", "1"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, input=b"piped", capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(texts_of(Store.open(config.out))) == sorted(["piped", *odd_inputs.ODD_FOLDER_TEXTS])
    said = done.stdout.decode()
    assert f"1 not read (another ending, see --extensions): {tmp_path}/folder/picture.png\n" in said
    assert f"2 not read (a pipe, socket or device): {tmp_path}/folder/" in said


def test_an_archive_in_a_store(config: Prepare, tmp_path: Path):
    path = tmp_path / "many.tgz"
    path.write_bytes(odd_inputs.readable()["many.tgz"][0])
    store = prepare(replace(config, sources=(str(path),)), quiet)
    assert texts_of(store) == odd_inputs.MEMBER_TEXTS
    assert store.split("train").document_name(0) == f"{path}/../../escape.txt"
    assert store.split("train").document_name(3) == f"{path}/in/lines.jsonl:2"
    assert store.index["not_read"]["a link"]["count"] == 1


def test_a_worker_survives_whatever_is_raised(monkeypatch: pytest.MonkeyPatch):
    block = next(
        iter(
            read_blocks(list_inputs([__file__], (".py",)), Reading(field="", on_invalid_utf8="replace", scratch=Path()))
        )
    )

    def fail(*_: object) -> None:
        raise KeyError("something new")

    monkeypatch.setattr(worker, "tokenize", fail)
    header, _ = worker._answer(block.block, None, None)  # type: ignore[arg-type]
    assert header["error"] == f"{__file__} cannot be read (KeyError: 'something new'): repair or remove it"
