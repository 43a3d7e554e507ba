"""Stores that were damaged, moved apart or tampered with."""

import json
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from meshgpt.data.prepare import Prepare, prepare
from meshgpt.data.store import Store
from meshgpt.data.tokenizer import train_bpe
from meshgpt.errors import UserError


def quiet(*_: object) -> None:
    """Shows no progress."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stores") / "store"
    config = Prepare(
        sources=(str(Path(sysconfig.get_path("stdlib")) / "asyncio"),),
        extensions=(".py",),
        out=str(out),
        train_tokenizer="bpe",
        vocab_size=400,
        val_fraction=0.2,
        workers=1,
        shard_tokens=50_000,
    )
    prepare(config, quiet)
    return out


@pytest.fixture
def store_dir(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1
    path.write_bytes(bytes(data))


def test_a_copied_store_is_the_same(original: Path, store_dir: Path):
    Store.open(store_dir).verify()
    assert Store.open(store_dir).digest == Store.open(original).digest


@pytest.mark.parametrize("name", ["train-00001.bin", "val.documents.npy", "sources.jsonl", "tokenizer/tokenizer.json"])
def test_a_flipped_bit_is_found_and_named(store_dir: Path, name: str):
    flip(store_dir / name, 12_345)
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        Store.open(store_dir).verify()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), r"train-00000\.bin has 99998 bytes instead of 100000"),
        (lambda path: path.unlink(), r"train-00000\.bin is missing"),
    ],
)
def test_a_short_or_missing_shard_is_named_at_once(store_dir: Path, damage: Callable[[Path], None], message: str):
    damage(store_dir / "train-00000.bin")
    with pytest.raises(UserError, match=message):
        Store.open(store_dir)


def test_an_index_cannot_point_outside(store_dir: Path):
    index = json.loads((store_dir / "index.json").read_text())
    for name in ("../../secret.bin", "/etc/passwd", "..", ""):
        index["splits"]["train"]["shards"][0]["file"] = name
        (store_dir / "index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match="no plain file name"):
            Store.open(store_dir)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"vocab_size": 3}'])
def test_a_damaged_index_is_named(store_dir: Path, content: str):
    (store_dir / "index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        Store.open(store_dir)


def test_no_store(tmp_path: Path):
    with pytest.raises(UserError, match=r"no token store at .*meshgpt prepare"):
        Store.open(tmp_path)


def test_another_tokenizer_is_refused(store_dir: Path):
    store = Store.open(store_dir)
    other = train_bpe(["other text"], 300)
    with pytest.raises(UserError, match=r"the tokenizer in a run \(\d+ ids, .* is not the one that made the store"):
        store.check_tokenizer(other, "a run")
    other.save(store_dir / "tokenizer")
    with pytest.raises(UserError, match="is not the one that made the store"):
        store.tokenizer()
