"""Files that are replaced in one piece: the old one or the new one, whatever fails, and durable before the name is."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from meshgpt import atomic
from meshgpt.atomic import rename_folder, replacing, write_atomically


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What reaches the disk and what gets a name, in order."""
    found: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(descriptor: int) -> None:
        found.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def noting_replace(old: Path, new: Path) -> None:
        found.append(("replace", Path(new).name))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    return found


def test_the_file_is_synced_before_it_has_its_name_and_the_name_after(tmp_path: Path, calls: list[tuple[str, str]]):
    write_atomically(tmp_path / "run.json", "é\n")
    assert (tmp_path / "run.json").read_bytes() == "é\n".encode()
    assert calls == [("fsync", "run.json.tmp"), ("replace", "run.json"), ("fsync", tmp_path.name)]
    calls.clear()
    write_atomically(tmp_path / "sign", b"\xff", durable=False)
    assert calls == [("replace", "sign")]


def fail(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _interrupted(scratch: Path) -> None:
    scratch.write_text("half")
    raise KeyboardInterrupt


@pytest.mark.parametrize("call", ["write_bytes", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
):
    path = tmp_path / "run.json"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(Path if call == "write_bytes" else os, call, fail)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, "new")
    with pytest.raises(KeyboardInterrupt), replacing(path) as scratch:
        _interrupted(scratch)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_gets_its_name_when_all_of_it_is_on_the_disk(tmp_path: Path, calls: list[tuple[str, str]]):
    folder = tmp_path / "partial"
    (folder / "deep").mkdir(parents=True)
    for file in ("a", "deep/b"):
        (folder / file).write_text(file)
    rename_folder(folder, tmp_path / "export")
    assert (tmp_path / "export" / "deep" / "b").read_text() == "deep/b"
    assert {name for kind, name in calls[:-2]} == {"a", "b", "deep", "partial"}
    assert calls[-2:] == [("replace", "export"), ("fsync", tmp_path.name)]


def test_nothing_in_the_package_replaces_a_file_in_another_way():
    """`atomic` alone calls os.replace, but for what moves files that are complete already."""
    package = Path(atomic.__file__).parent
    allowed = {"atomic.py", "training/run_folder.py", "chaos/worker.py"}
    using: Callable[[Path], bool] = lambda path: "os.replace(" in path.read_text(encoding="utf-8")  # noqa: E731
    found = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if using(path)}
    assert found <= allowed
