"""A run's folder: claimed by one process, kept from other configurations, set aside, never lost."""

import dataclasses
import errno
import json
from pathlib import Path

import pytest
import tiny

from meshgpt.checkpoint import orbax_io
from meshgpt.config import Data, Run, to_json
from meshgpt.errors import UserError
from meshgpt.optim.config import AdamW
from meshgpt.training.run_folder import RunFolder

RUN = Run(model=tiny.GPTJ, data=Data(store="a store"), steps=10, global_batch=8)


def claim(folder: RunFolder, run: Run = RUN) -> list[str]:
    said: list[str] = []
    with folder.claimed(run, "the command", said.append):
        folder.record_run(run, "the command")
    return said


def trained(path: Path) -> RunFolder:
    """A folder whose run has saved a checkpoint."""
    folder = RunFolder(path)
    claim(folder)
    folder.checkpoints.mkdir()
    (folder.checkpoints / "5.digests.json").write_text("{}")
    return folder


def test_the_record_says_what_ran(tmp_path: Path):
    folder = RunFolder(tmp_path / "deep" / "run")
    claim(folder)
    record = json.loads(folder.record.read_text())
    assert record["command"] == "the command"
    assert record["seed"] == RUN.seed
    assert record["versions"].keys() >= {"jax", "numpy", "optax"}
    assert record["finished_step"] is None
    assert folder.read_run() == RUN
    folder.mark_finished(10)
    assert folder.finished_step() == 10
    claim(folder)
    assert folder.finished_step() == 10


def test_one_process_at_a_time(tmp_path: Path):
    folder = RunFolder(tmp_path)
    with folder.claimed(RUN, "", print), pytest.raises(UserError, match="another process"):
        claim(RunFolder(tmp_path))
    claim(folder)


def test_the_record_stays_until_all_checks_are_passed(tmp_path: Path):
    folder = trained(tmp_path)
    before = folder.record.read_bytes()
    with folder.claimed(dataclasses.replace(RUN, steps=20), "another", print):
        assert folder.record.read_bytes() == before
        folder.record_run(dataclasses.replace(RUN, steps=20), "another")
        assert folder.read_run().steps == 20


def test_a_locked_field_is_named_and_nothing_changes(tmp_path: Path):
    folder = trained(tmp_path)
    before = folder.record.read_bytes()
    changed = dataclasses.replace(RUN, seed=4, optim=AdamW(peak_lr=1.0))
    with pytest.raises(UserError, match=r"seed was 0, now 4; optim\.peak_lr was 0\.0006, now 1\.0.*--resume never"):
        claim(folder, changed)
    assert folder.record.read_bytes() == before


def test_free_fields_may_change_and_are_reported(tmp_path: Path):
    folder = trained(tmp_path)
    assert claim(folder, dataclasses.replace(RUN, steps=20)) == ["resuming with steps 20 (was 10)"]
    assert claim(folder, dataclasses.replace(RUN, steps=20, resume="must")) == []


def test_without_a_checkpoint_every_field_may_change(tmp_path: Path):
    folder = RunFolder(tmp_path)
    claim(folder)
    claim(folder, dataclasses.replace(RUN, seed=4))
    assert folder.read_run().seed == 4


def test_setting_aside_moves_all_but_the_text(tmp_path: Path):
    folder = trained(tmp_path / "run")
    (folder.data).mkdir()
    (folder.data / "index.json").write_text("{}")
    folder.metrics.write_text("mine")
    said = claim(folder, dataclasses.replace(RUN, seed=4, resume="never"))
    aside = RunFolder(tmp_path / "run.previous-1")
    assert said == [f"the earlier run is now in {aside.path}"]
    assert aside.metrics.read_text() == "mine"
    assert aside.read_run() == RUN
    assert (aside.checkpoints / "5.digests.json").exists()
    assert not folder.metrics.exists()
    assert not folder.checkpoints.exists()
    assert (folder.data / "index.json").exists()
    claim(folder, dataclasses.replace(RUN, resume="never"))
    assert RunFolder(tmp_path / "run.previous-2").read_run().seed == 4


def test_a_kill_while_setting_aside_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = trained(tmp_path / "run")
    folder.samples.write_text("mine")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("meshgpt.training.run_folder.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            claim(folder, dataclasses.replace(RUN, resume="never"))
    claim(folder, dataclasses.replace(RUN, resume="never"))
    assert (tmp_path / "run.previous-2" / "samples.txt").read_text() == "mine"


def test_a_kill_before_the_first_record_does_not_lock_the_folder(tmp_path: Path):
    (tmp_path / "run.json.tmp").write_text("{")
    (tmp_path / "data").mkdir()
    claim(RunFolder(tmp_path))


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, resume: str):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"not empty and holds no run \(it has thesis\.tex\)"):
        claim(RunFolder(tmp_path), dataclasses.replace(RUN, resume=resume))
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_must_needs_a_run(tmp_path: Path):
    with pytest.raises(UserError, match="--resume must"):
        claim(RunFolder(tmp_path), dataclasses.replace(RUN, resume="must"))


def test_a_file_is_no_folder(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to the run's folder .*--run-dir"):
        claim(RunFolder(tmp_path / "file"))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"run": 3}', "\x00\x00"])
def test_a_damaged_record_is_named(tmp_path: Path, text: str):
    folder = trained(tmp_path)
    folder.record.write_text(text)
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        claim(folder)
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        folder.read_run()


def test_a_folder_without_a_run(tmp_path: Path):
    with pytest.raises(UserError, match="holds no run"):
        RunFolder(tmp_path).read_run()


def test_a_full_disk_is_explained_and_other_errors_are_not(tmp_path: Path):
    folder = RunFolder(tmp_path)
    with pytest.raises(UserError, match=r"metrics.* full.*Free space"), folder.claimed(RUN, "", print):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder.metrics))
    with pytest.raises(PermissionError), folder.claimed(RUN, "", print):
        raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize("content", ["", '{"run": ', "[]", '{"run": 3}'])
def test_a_damaged_record_says_what_to_do_and_that_works(tmp_path: Path, content: str):
    """Deleting it goes on from the checkpoints, which have the configuration; without one, `--resume never` works."""
    folder = RunFolder(tmp_path / "run")
    claim(folder)
    folder.metrics.write_text("")
    folder.record.write_text(content)
    with pytest.raises(UserError, match=r"run\.json is damaged.*--resume never: nothing was saved here"):
        claim(folder)
    claim(folder, dataclasses.replace(RUN, resume="never"))

    saved = folder.checkpoints / "5" / orbax_io.METADATA / orbax_io.METADATA
    saved.parent.mkdir(parents=True)
    saved.write_text(json.dumps({"run": to_json(RUN)}))
    (folder.checkpoints / "5.digests.json").write_text("{}")
    folder.record.write_text(content)
    with pytest.raises(UserError, match=r"run\.json is damaged.*delete this one file.*goes on from the newest check"):
        claim(folder)
    folder.record.unlink()
    other = dataclasses.replace(RUN.model, n_layers=RUN.model.n_layers + 1)
    with pytest.raises(UserError, match=r"model\.n_layers was"):
        claim(folder, dataclasses.replace(RUN, model=other))
    assert folder.read_run() == RUN
    assert not folder.record.exists()
    claim(folder)
    assert folder.read_run() == RUN
    assert folder.finished_step() is None
