"""Preparing real source code into a store: against the tokenizer itself, across workers, kills and bad input."""

import fcntl
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import zstandard

from meshgpt.data.documents import split_hash
from meshgpt.data.prepare import Prepare, prepare
from meshgpt.data.store import Store
from meshgpt.data.text_files import list_files
from meshgpt.data.tokenizer import load_tokenizer, train_bpe, train_sentencepiece
from meshgpt.errors import MachineError, UserError

STDLIB = Path(sysconfig.get_path("stdlib"))
FILES = sorted((STDLIB / "asyncio").glob("*.py")) + sorted((STDLIB / "email").glob("*.py"))


def quiet(*_: object) -> None:
    """Shows no progress."""


@pytest.fixture(scope="module")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "source"
    folder.mkdir()
    for path in FILES:
        shutil.copy(path, folder / f"{path.parent.name}_{path.name}")
    (folder / "empty.py").write_text("")
    (folder / "zz_long.py").write_text("".join(p.read_text(encoding="utf-8") for p in FILES) * 2, encoding="utf-8")
    (folder / "ignored.bin").write_bytes(b"\xff\xfe")
    return folder


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([path.read_text(encoding="utf-8") for path in FILES], 600).save(folder)
    return folder


@pytest.fixture
def config(text_dir: Path, tokenizer_dir: Path, tmp_path: Path) -> Prepare:
    return Prepare(
        sources=(str(text_dir),),
        out=str(tmp_path / "store"),
        tokenizer=str(tokenizer_dir),
        extensions=(".py",),
        val_fraction=0.2,
        workers=1,
        shard_tokens=100_000,
    )


def folder_bytes(folder: str | Path) -> dict[str, str]:
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def all_texts(store: Store) -> list[str]:
    tokenizer = store.tokenizer()
    splits = [store.split(name) for name in ("train", "val")]
    return [tokenizer.decode(s.document_tokens(i)[:-1]) for s in splits for i in range(s.num_documents)]


def test_store_holds_every_document_in_order(config: Prepare, text_dir: Path, tokenizer_dir: Path):
    store = prepare(config, quiet)
    store.verify()
    tokenizer = load_tokenizer(tokenizer_dir)
    for name in ("train", "val"):
        split = store.split(name)
        texts = {}
        for path in sorted(text_dir.glob("*.py")):
            data = path.read_bytes()
            if data and (split_hash(data) < 0.2) == (name == "val"):
                texts[path] = data.decode()
        expected = [[*tokenizer.encode(text), tokenizer.eot_id] for text in texts.values()]
        assert len(texts) > 3
        assert np.array_equal(split.tokens(0, split.num_tokens), np.concatenate(expected))
        assert split.tokens(0, 1).dtype == np.uint16
        assert [split.document_name(i) for i in range(split.num_documents)] == [str(path) for path in texts]
        assert np.array_equal(split.documents["end"], np.cumsum([len(ids) for ids in expected]))
        assert list(split.documents["bytes"]) == [len(text.encode()) for text in texts.values()]
        digests = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts.values()]
        assert split.documents["digest"].tobytes() == b"".join(digests)
        assert split.num_bytes == sum(len(text.encode()) for text in texts.values())
        assert [split.document_at(int(end) - 1) for end in split.documents["end"]] == list(range(len(texts)))
        if name == "val":
            assert split.gzip_bytes is not None
            reference = gzip.compress("".join(texts.values()).encode(), 9)
            assert abs(split.gzip_bytes - len(reference)) <= 64  # headers, and zlib's choice of memory level


def test_gzip_size_is_the_programs(config: Prepare, tmp_path: Path):
    store = prepare(config, quiet)
    text = "".join(all_texts(store)[store.split("train").num_documents :])
    (tmp_path / "val.txt").write_text(text, encoding="utf-8")
    output = subprocess.run(["gzip", "-9", "-n", "-c", str(tmp_path / "val.txt")], capture_output=True, check=True)
    assert store.split("val").gzip_bytes == pytest.approx(len(output.stdout), rel=0.002)


def test_tokens_across_shards(config: Prepare):
    whole = prepare(config, quiet).split("train")
    many = prepare(replace(config, out=config.out + "2", shard_tokens=7_777), quiet).split("train")
    assert len(whole.shards) < len(many.shards)
    everything = whole.tokens(0, whole.num_tokens)
    rng = random.Random(0)
    for _ in range(200):
        start, stop = sorted(rng.randrange(whole.num_tokens + 1) for _ in range(2))
        assert np.array_equal(many.tokens(start, stop), everything[start:stop])
    for start, stop in ((-1, 3), (5, 4), (0, whole.num_tokens + 1)):
        with pytest.raises(IndexError):
            many.tokens(start, stop)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_workers_do_not_change_a_byte(config: Prepare, kind: str, tmp_path: Path):
    trained = replace(config, tokenizer=None, train_tokenizer=kind, vocab_size=700)
    stores = [replace(trained, out=str(tmp_path / str(workers)), workers=workers) for workers in (1, 3)]
    for one in stores:
        prepare(one, quiet)
    assert folder_bytes(stores[0].out) == folder_bytes(stores[1].out)


def test_a_document_larger_than_a_block_has_the_tokens_of_the_whole(text_dir: Path, tmp_path: Path):
    text = (text_dir / "zz_long.py").read_text(encoding="utf-8")
    assert len(text) > 3 << 19
    for train in (train_bpe, train_sentencepiece):
        tokenizer = train([text[: 1 << 19]], 600)
        tokenizer.save(tmp_path / train.__name__)
        store = prepare(
            Prepare(
                sources=(str(text_dir / "zz_long.py"),),
                out=str(tmp_path / f"{train.__name__}-store"),
                tokenizer=str(tmp_path / train.__name__),
                val_fraction=0.0,
                workers=2,
            ),
            quiet,
        )
        split = store.split("train")
        assert split.num_documents == 1
        assert split.tokens(0, split.num_tokens).tolist() == [*tokenizer.encode(text), tokenizer.eot_id]
        assert split.documents["bytes"][0] == len(text.encode())
        assert split.documents["digest"].tobytes() == hashlib.blake2b(text.encode(), digest_size=16).digest()


RUN = """
import sys
from meshgpt.data.prepare import Prepare, prepare
from meshgpt.data import blocks, prepare as module
module._COMMIT_SECONDS = 0.0
blocks.BLOCK_BYTES = 1 << 17
import json
config = json.load(open(sys.argv[1]))
config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
prepare(Prepare(**config), lambda *a: print(*a, flush=True))
"""


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def test_sigkill_anywhere_then_rerun_gives_the_same_bytes(
    config: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Kills after so many lines of progress: training the tokenizer, tokenizing, finishing."""
    monkeypatch.setattr("meshgpt.data.blocks.BLOCK_BYTES", 1 << 17)
    (tmp_path / "a.jsonl").write_bytes(jsonl([path.read_text(encoding="utf-8") for path in FILES]))
    trained = replace(config, sources=(str(tmp_path / "a.jsonl"), *config.sources))
    trained = replace(trained, tokenizer=None, train_tokenizer="bpe", vocab_size=500, workers=2, shard_tokens=50_000)
    prepare(trained, quiet)
    again = replace(trained, out=str(tmp_path / "killed"))
    (tmp_path / "config.json").write_text(json.dumps(asdict(again)))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    shared_memory = set(os.listdir("/dev/shm"))
    orphans: list[int] = []
    command = [sys.executable, "-c", RUN, str(tmp_path / "config.json")]
    stages = ("training", 1), ("training", 20), ("tokenizing", 3), ("tokenizing", 3), ("tokenizing", 9), ("gzip", 1)
    for stage, lines in stages:
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            seen = 0
            while seen < lines:
                line = process.stdout.readline()
                assert line, f"ended before {lines} lines of {stage}"
                seen += line.startswith(stage)
            orphans += children(process.pid)
            process.kill()
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    assert folder_bytes(again.out) == folder_bytes(trained.out)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/cmdline").exists() and b"meshgpt" in _cmdline(pid) for pid in orphans):
        assert time.monotonic() < deadline, f"workers {orphans} outlived their parent"
        time.sleep(0.05)
    assert set(os.listdir("/dev/shm")) <= shared_memory


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_held_out_text_does_not_train_the_tokenizer(config: Prepare, tmp_path: Path):
    (tmp_path / "train.txt").write_text("alphabet " * 500)
    (tmp_path / "val.txt").write_text("zebra " * 500)
    trained = replace(config, tokenizer=None, train_tokenizer="bpe", vocab_size=300, val_fraction=0.0)
    files = replace(trained, sources=(str(tmp_path / "train.txt"),), val_sources=(str(tmp_path / "val.txt"),))
    tokenizer = prepare(files, quiet).tokenizer()
    assert len(tokenizer.encode(" alphabet")) == 1
    assert len(tokenizer.encode(" zebra")) == 6


def test_a_resumed_run_does_not_start_over(config: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("meshgpt.data.prepare._COMMIT_SECONDS", 0.0)
    prepare(replace(config, out=str(tmp_path / "whole")), quiet)
    seen: list[int] = []

    def interrupt(_: str, done: int, __: int | None) -> None:
        seen.append(done)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, interrupt)
    with pytest.raises(UserError, match="unfinished"):
        Store.open(config.out)
    resumed: list[int] = []
    prepare(config, lambda _, done, __: resumed.append(done))
    assert resumed[0] >= seen[2]
    assert folder_bytes(config.out) == folder_bytes(tmp_path / "whole")


def test_a_finished_store_is_opened_at_once(config: Prepare):
    prepare(config, quiet)

    def never(*progress: object) -> None:
        raise AssertionError(progress)

    prepare(replace(config, workers=3), never)


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines_plain_and_compressed(config: Prepare, suffix: str, tmp_path: Path):
    texts = [path.read_text(encoding="utf-8") for path in FILES] * 3
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    data = jsonl(texts)
    assert len(data) > 2 << 20
    # Two members, or two frames: both are legal, and a reader that stops after the first loses data.
    path.write_bytes(pack(data[:5000]) + pack(data[5000:]) if suffix else data)
    store = prepare(replace(config, sources=(str(path),), val_fraction=0.0), quiet)
    split = store.split("train")
    assert all_texts(store) == texts
    assert [split.document_name(i) for i in range(len(texts))] == [f"{path}:{i + 1}" for i in range(len(texts))]
    [source] = [json.loads(line) for line in (Path(config.out) / "sources.jsonl").read_text().splitlines()]
    assert source == {
        "name": str(path),
        "size": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def test_a_line_longer_than_a_block(config: Prepare, tmp_path: Path):
    texts = ["short", "long " * 600_000, "after"]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts).rstrip(b"\n"))
    store = prepare(replace(config, sources=(str(tmp_path / "a.jsonl"),), val_fraction=0.0), quiet)
    assert all_texts(store) == texts


def test_held_out_files_and_globs(config: Prepare, text_dir: Path):
    only = (str(text_dir / "email_*.py"),)
    held_out = (str(text_dir / "asyncio_events.py"), str(text_dir / "asyncio_tasks.py"))
    store = prepare(replace(config, sources=only, val_sources=held_out, val_fraction=0.0), quiet)
    val = store.split("val")
    assert [val.document_name(i) for i in range(val.num_documents)] == list(held_out)
    assert store.split("train").num_documents == len(list((STDLIB / "email").glob("*.py")))


def test_invalid_utf8_is_counted_or_refused(config: Prepare, tmp_path: Path):
    (tmp_path / "good.txt").write_text("fine \ufffd text")
    (tmp_path / "latin.txt").write_bytes("\ufeffcaf\u00e9".encode("utf-8") + b" na\xefve \xe9t\xe9")
    (tmp_path / "half.jsonl").write_bytes(b'{"text": "half a pair \\ud83d here"}\n{"text": "raw \xff byte"}\n')
    sources = tuple(str(tmp_path / name) for name in ("good.txt", "latin.txt", "half.jsonl"))
    replaced = replace(config, sources=sources, val_fraction=0.0)
    store = prepare(replaced, quiet)
    texts = ["fine \ufffd text", "caf\u00e9 na\ufffdve \ufffdt\ufffd"]
    assert all_texts(store)[:2] == texts
    assert all_texts(store)[3] == "raw \ufffd byte"
    assert store.index["counts"]["replaced_documents"] == 3
    for i, message in ((1, "latin.txt"), (2, "half.jsonl:1")):
        strict = replace(replaced, sources=sources[i : i + 1], on_invalid_utf8="error", out=config.out + str(i))
        with pytest.raises(UserError, match=rf"{message} is not UTF-8.*--on-invalid-utf8 replace"):
            prepare(strict, quiet)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2 is not valid JSON"),
        (b'{"text": "a"}\n\n["b"]\n', r"a\.jsonl:3 holds a JSON list"),
        (b'{"content": "a", "id": 1}\n', r"a\.jsonl:1 has no field 'text', only \['content', 'id'\].*--field"),
        (b'{"text": 3}\n', r"a\.jsonl:1: field 'text' is a int"),
        (b"[" * 100_000 + b"\n", r"a\.jsonl:1 is not valid JSON"),
    ],
)
def test_bad_json_lines_are_named(config: Prepare, tmp_path: Path, lines: bytes, message: str):
    (tmp_path / "a.jsonl").write_bytes(lines)
    with pytest.raises(UserError, match=message):
        prepare(replace(config, sources=(str(tmp_path / "a.jsonl"),)), quiet)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_damaged_archives_are_named(config: Prepare, tmp_path: Path, suffix: str, damage: str):
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor(write_checksum=True).compress
    data = pack(FILES[2].read_bytes() * 40)
    (tmp_path / f"a.txt{suffix}").write_bytes(data[:-20] if damage == "cut" else b"noise" + data)
    with pytest.raises(UserError, match=rf"a\.txt\{suffix} is damaged or cut short"):
        prepare(replace(config, sources=(str(tmp_path / f"a.txt{suffix}"),)), quiet)


def test_sources_that_are_not_there(config: Prepare, tmp_path: Path, text_dir: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("")
    (tmp_path / "word.txt").write_text("word")
    cases = [
        (("no/such/file.txt",), "'no/such/file.txt' does not exist"),
        (("no/such/*.txt",), r"'no/such/\*.txt' does not exist"),
        ((str(tmp_path / "empty"),), "holds no file ending in .py.*--extensions"),
        ((str(text_dir), str(text_dir / "email_header.py")), "email_header.py is named twice"),
        ((str(tmp_path / "blank.txt"),), "holds no text at all"),
        ((str(tmp_path / "word.txt"),), "none of the 1 documents.*--val-sources, or pass --val-fraction 0"),
    ]
    for i, (sources, message) in enumerate(cases):
        with pytest.raises(UserError, match=message):
            prepare(replace(config, sources=sources, out=f"{config.out}{i}", val_fraction=0.001), quiet)


def test_a_folder_that_holds_something_else(config: Prepare, text_dir: Path, tmp_path: Path):
    prepare(config, quiet)
    other = replace(config, val_fraction=0.5)
    with pytest.raises(UserError, match=r"val_fraction was 0.2, now 0.5.*--overwrite"):
        prepare(other, quiet)
    assert prepare(replace(other, overwrite=True), quiet).split("val").num_documents > 10
    (text_dir / "added.py").write_text("x = 1\n")
    try:
        with pytest.raises(UserError, match=r"added.py was added, removed or changed"):
            prepare(other, quiet)
    finally:
        (text_dir / "added.py").unlink()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty and holds no token store"):
        prepare(replace(config, out=str(tmp_path / "mine"), overwrite=True), quiet)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_two_at_once_are_refused(config: Prepare):
    Path(config.out).mkdir()
    with open(Path(config.out) / "prepare.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another prepare is at work"):
            prepare(config, quiet)


def test_a_worker_that_dies_is_reported(config: Prepare, monkeypatch: pytest.MonkeyPatch):
    def kill_worker(*_: object) -> None:
        for pid in children(os.getpid()):
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(MachineError, match=r"worker process died \(exit status -9\).*run the same command again"):
        prepare(config, kill_worker)
    prepare(config, quiet).verify()


def test_a_full_disk_is_reported(config: Prepare, monkeypatch: pytest.MonkeyPatch):
    from meshgpt.data.writer import Appender

    def full(self: Appender, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Appender, "append", full)
        with pytest.raises(UserError, match=r"the disk is full.*what is done is kept"):
            prepare(config, quiet)
    prepare(config, quiet).verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": None}, "name one tokenizer"),
        ({"train_tokenizer": "bpe", "vocab_size": 300}, "name one tokenizer"),
        ({"tokenizer": None, "train_tokenizer": "bpe"}, "needs --vocab-size"),
        ({"vocab_size": 300}, "--vocab-size 300 goes with"),
        ({"val_fraction": 1.0}, "val_fraction 1.0"),
        ({"val_fraction": float("nan")}, "val_fraction=nan"),
        ({"workers": -1}, "workers -1"),
        ({"shard_tokens": 0}, "shard_tokens 0"),
        ({"sources": ()}, "no source"),
    ],
)
def test_settings_that_cannot_be(config: Prepare, change: dict, message: str):
    with pytest.raises(UserError, match=message):
        replace(config, **change)


def test_the_standard_library_is_a_source():
    files = list_files("stdlib", ())
    names = {file.name for file in files}
    assert {"stdlib/json/decoder.py", "stdlib/os.py"} <= names
    assert not any("site-packages" in name or "/test/" in name for name in names)
    assert sum(file.size for file in files) > 8 << 20
