import hashlib
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pods import Pod

from meshgpt.checkpoint import manifest as digests
from meshgpt.checkpoint import shared_digests


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "20"
    (folder / "params" / "d").mkdir(parents=True)
    generator = random.Random(0)
    for name, size in {"a": 3000, "params/b": 1, "params/empty": 0, "params/d/c": 700}.items():
        (folder / name).write_bytes(generator.randbytes(size))
    digests.write_manifest(folder)
    return folder


def _rewrite(folder: Path, change) -> None:
    """Changes the manifest, with the digest of its own that write_manifest would give it."""
    manifest = digests.manifest_path(folder)
    document = json.loads(manifest.read_text())
    del document["sha256"]
    change(document)
    text = json.dumps(document, indent=1, sort_keys=True) + "\n"
    document["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    manifest.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def test_what_was_written_is_intact(folder: Path):
    digests.verify(folder)
    assert digests.size(folder) == 3701
    assert not list(folder.parent.glob("*.tmp"))


def test_the_digests_are_those_of_sha256(folder: Path):
    files = json.loads(digests.manifest_path(folder).read_text())["files"]
    assert files["params/empty"] == {
        "size": 0,
        "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",  # FIPS 180-4, the empty message
    }


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "params/b").unlink(), "params/b is missing"),
        (lambda folder: os.truncate(folder / "a", 2999), "a has 2,999 bytes instead of 3,000"),
        (lambda folder: (folder / "params/d/extra").touch(), "params/d/extra is not in the manifest"),
        (lambda folder: (folder / "params/b").write_bytes(b"\x00\x01"), "params/b has 2 bytes instead of 1"),
        (lambda folder: (folder / "a").write_bytes(bytes(3000)), "a does not match its digest"),
        (lambda folder: digests.manifest_path(folder).unlink(), "it has no 20.digests.json"),
        (lambda folder: digests.manifest_path(folder).write_bytes(b"\xff"), "20.digests.json cannot be read"),
        (lambda folder: digests.manifest_path(folder).write_text("[]"), "20.digests.json is damaged"),
        (lambda folder: folder.rename(folder.with_name("elsewhere")), "its folder is missing"),
    ],
)
def test_damage_is_named(folder: Path, damage, message: str):
    damage(folder)
    with pytest.raises(digests.DamagedError, match=message):
        digests.verify(folder)


def test_many_damaged_files_are_counted(folder: Path):
    for number in range(7):
        (folder / f"extra{number}").touch()
    with pytest.raises(digests.DamagedError, match=r"extra0 .*; extra1 .*; extra2 .*; and 4 more$"):
        digests.verify(folder)


@pytest.mark.parametrize(
    "path", ["../outside", "/etc/passwd", "params/../../outside", "a/./b", "a//b", "..\\b", ".", ""]
)
def test_a_manifest_may_not_name_a_path_outside(folder: Path, path: str):
    outside = folder.parent / "outside"
    outside.touch()
    _rewrite(folder, lambda document: document["files"].update({path: document["files"]["params/empty"]}))
    with pytest.raises(digests.DamagedError, match="not a path inside the folder"):
        digests.verify(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.update(version=2),
        lambda document: document.update(folder="10"),
        lambda document: document.update(more=1),
        lambda document: document.pop("files"),
        lambda document: document["files"]["a"].pop("sha256"),
        lambda document: document["files"]["a"].update(size="3000"),
        lambda document: document["files"]["a"].update(more=1),
        lambda document: document["files"].update(a=None),
    ],
)
def test_a_manifest_of_another_form_is_refused(folder: Path, change):
    _rewrite(folder, change)
    with pytest.raises(digests.DamagedError, match=r"20\.digests\.json is damaged"):
        digests.verify(folder)


def test_links_are_refused(folder: Path):
    target = folder.parent / "same content"
    (folder / "a").rename(target)
    (folder / "a").symlink_to(target)
    with pytest.raises(digests.DamagedError, match="a is not a plain file"):
        digests.verify(folder)
    with pytest.raises(digests.DamagedError, match="a is not a plain file"):
        digests.write_manifest(folder)


def test_links_to_folders_are_refused(folder: Path):
    target = folder.parent / "moved"
    (folder / "params").rename(target)
    (folder / "params").symlink_to(target)
    with pytest.raises(digests.DamagedError, match="params is not a plain file"):
        digests.verify(folder)


def test_every_flipped_bit_of_the_manifest_is_caught(folder: Path):
    manifest = digests.manifest_path(folder)
    content = manifest.read_bytes()
    for position in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        manifest.write_bytes(flipped)
        with pytest.raises(digests.DamagedError, match=r"20\.digests\.json"):
            digests.verify(folder)


def test_the_manifest_appears_whole_or_not_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch):
    before = digests.manifest_path(folder).read_bytes()
    (folder / "a").write_bytes(b"new")

    def power_fails(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".tmp"):
            raise OSError("the power fails")

    monkeypatch.setattr(os, "fsync", power_fails)
    with pytest.raises(OSError, match="the power fails"):
        digests.write_manifest(folder)
    assert digests.manifest_path(folder).read_bytes() == before


def test_the_parts_read_each_file_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    files = ["a", "params/b", "params/d/c", "params/empty"]
    for name in files[:3]:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        finders = []
        for index in range(3):
            try:
                digests.verify(folder, (index, 3))
            except digests.DamagedError as damage:
                assert str(damage) == f"{name} does not match its digest"  # noqa: PT017 (it is raised by one of three)
                finders.append(index)
        assert len(finders) == 1, name
        (folder / name).write_bytes(content)
    read: list[str] = []
    digest = digests._digest
    monkeypatch.setattr(
        digests, "_digest", lambda path, moved, durable: read.append(path.name) or digest(path, moved, durable=durable)
    )
    for index in range(3):
        digests.verify(folder, (index, 3))
    assert sorted(read) == ["a", "b", "c", "empty"]


def test_several_processes_make_and_check_them_together(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Each reads its part; one that is slow is waited for, and what one cannot read process 0 reads."""
    whole = digests.manifest_path(folder).read_bytes()
    digests.manifest_path(folder).unlink()
    pod = Pod(monkeypatch, 3)
    read: list[tuple[int, str]] = []
    digest, files = digests._digest, digests.digest_files

    def noting(folder: Path, sizes: dict[str, int], progress: Callable[[], None]) -> digests.Files:
        number = pod.local.number
        read.extend((number, path) for path in sizes)
        if number == 1:
            time.sleep(0.5)
        if number == 2:
            raise digests.DamagedError("a host that does not see the files yet")
        return files(folder, sizes, progress)

    monkeypatch.setattr(digests, "digest_files", noting)
    then: list[int] = []

    def write(number: int) -> bool:
        shared_digests.write_manifest(folder, "meshgpt/digests/1", then=lambda: then.append(number))
        return digests.manifest_path(folder).exists()

    assert pod.run(write) == [True] * 3  # on each of them it is there when the call returns
    assert digests.manifest_path(folder).read_bytes() == whole
    assert then == [0]
    largest_first = ["a", "params/d/c", "params/b", "params/empty"]
    assert sorted(read) == sorted([(i % 3, path) for i, path in enumerate(largest_first)] + [(0, "params/b")])
    assert list(pod.values) == ["meshgpt/digests/1/done"]  # what all have heard is forgotten

    def fail(folder: Path) -> dict[str, int]:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(digests, "list_files", fail)
        said = pod.run(lambda number: shared_digests.write_manifest(folder, "meshgpt/digests/2"))
    assert said[0] == "[Errno 28] No space left on device"
    assert said[1] == said[2] == f"process 0 could not complete the checkpoint {folder}: {said[0]}"

    assert digest is digests._digest
    led = Pod(monkeypatch, 3)
    (folder / "params/b").write_bytes(b"!")

    def work(verify: Callable[[Path], None]) -> int:
        with pytest.raises(digests.DamagedError, match="params/b does not match its digest"):
            verify(folder)
        return 7

    assert led.run(lambda number: shared_digests.led(folder.parent, work)) == [7, 7, 7]
