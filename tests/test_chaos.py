"""`meshgpt chaos`: its plan, its disk, what its proof refuses, and the whole of it in small."""

import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import runs
from runs import Here, Workshop

from meshgpt.chaos import faults, proof
from meshgpt.chaos.disk import Disk, small_disk
from meshgpt.chaos.faults import Fault, Injector, Kind, plan
from meshgpt.checkpoint import manifest
from meshgpt.checkpoint.manager import Checkpointer
from meshgpt.data.pipeline import Batches
from meshgpt.distributed.heartbeat import SAVING, STEPPING, HeartbeatRecord
from meshgpt.distributed.supervisor import Scene
from meshgpt.training.data import open_run


def test_a_plan_is_the_seeds_and_has_every_kind():
    planned = plan(20, 3, 200)
    assert planned == plan(20, 3, 200)
    assert planned != plan(20, 4, 200)
    for count in (7, 20, 200):
        for seed in range(20):
            kinds = [fault.kind for fault in plan(count, seed, 10 * count)]
            assert Counter(kinds).keys() == set(Kind)
            assert len(kinds) == count
            before = [kind for kind, after in itertools.pairwise(kinds) if after is Kind.START]
            assert kinds[0] is not Kind.START
            assert Kind.SLOW not in before  # slowness brings nothing down that could start up
    assert [fault.after for fault in planned] == sorted(fault.after for fault in planned)
    assert planned[-1].after < 200
    assert len(plan(1, 0, 8)) == 1


class Watched:
    """An injector over sleeping processes, and what it has done to them."""

    def __init__(self, folder: Path, *kinds: Kind) -> None:
        self.folder, self.records = folder, []
        (folder / "checkpoints").mkdir(parents=True)
        planned = [Fault(kind=kind, after=5, victim=0.9, delay=0.0) for kind in kinds]
        self.injector = Injector(
            planned, folder / "checkpoints", Disk(folder, False), folder / "slow", self.records.append
        )
        self.processes: list[subprocess.Popen[bytes]] = []
        self.start()

    def start(self) -> None:
        self.end()
        self.processes = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def see(self, step: int | None, doing: str = STEPPING) -> None:
        sign = None if step is None else HeartbeatRecord(first=0, last=step, step_seconds=0.01, doing=doing)
        for _ in range(3):
            self.injector(Scene(processes=self.processes, signs=[sign, sign], lives=0))

    def checkpoint(self, step: int, complete: bool = True) -> Path:
        place = self.folder / "checkpoints" / str(step)
        place.mkdir()
        (place / "array").write_bytes(bytes(1000))
        if complete:
            manifest.write_manifest(place)
        return place


def state_of(process: subprocess.Popen[bytes]) -> str:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_fault_waits_for_its_moment_and_a_life_has_one(tmp_path: Path):
    watched = Watched(tmp_path, Kind.STEP, Kind.START, Kind.STOP)
    try:
        watched.see(4)
        watched.see(5, SAVING)
        assert not watched.records
        watched.see(5)
        assert watched.processes[1].wait(60) == -signal.SIGKILL
        assert watched.processes[0].poll() is None
        watched.see(9)
        watched.start()
        watched.see(None)
        assert watched.processes[1].wait(60) == -signal.SIGKILL
        watched.start()
        watched.see(9)
        until = time.monotonic() + 60
        while state_of(watched.processes[1]) != "T" and time.monotonic() < until:
            time.sleep(0.01)
        assert state_of(watched.processes[1]) == "T"
        assert [record["kind"] for record in watched.records] == [Kind.STEP, Kind.START, Kind.STOP]
        assert not watched.injector.pending
    finally:
        watched.end()


def test_a_save_is_recognised_by_what_it_has_not_finished(tmp_path: Path):
    watched = Watched(tmp_path, Kind.SAVE)
    try:
        old = watched.checkpoint(2, complete=False)
        os.utime(old, (1, 1))  # left by an earlier life
        watched.checkpoint(4)
        watched.see(6)
        assert not watched.records
        time.sleep(0.05)
        (tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir()
        watched.see(8)
        time.sleep(0.06)
        watched.see(8)
        assert watched.processes[1].wait(60) == -signal.SIGKILL
    finally:
        watched.end()


def test_bits_are_flipped_only_where_an_intact_checkpoint_is_left(tmp_path: Path):
    watched = Watched(tmp_path, Kind.FLIP)
    try:
        watched.checkpoint(2)
        watched.see(6)
        assert not watched.records
        watched.checkpoint(4)
        faults.flip(tmp_path / "checkpoints", random.Random(0))
        watched.checkpoint(6)
        watched.see(6)
        assert not watched.records  # 4 is damaged already
        watched.checkpoint(8)
        watched.see(8)
        assert watched.processes[1].wait(60) == -signal.SIGKILL
        manifest.verify(tmp_path / "checkpoints" / "6")
        with pytest.raises(manifest.DamagedError, match="array does not match"):
            manifest.verify(tmp_path / "checkpoints" / "8")
    finally:
        watched.end()


def test_a_mounted_disk_is_full_and_has_room_again(tmp_path: Path):
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        if not disk.mounted:  # not root: the limit below stands in
            return
        disk.fill([])
        with pytest.raises(OSError, match="No space left") as caught:
            (disk.path / "file").write_bytes(bytes(1 << 16))
        assert caught.value.errno == errno.ENOSPC
        disk.free()
        (disk.path / "file").write_bytes(bytes(1 << 16))
    assert not any((tmp_path / "disk").iterdir())


def test_without_a_mount_the_processes_get_a_limit(tmp_path: Path):
    script = f"open({str(tmp_path / 'file')!r}, 'wb').write(bytes(1 << 16)) if input() else 0"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        Disk(tmp_path, False).fill([process.pid])
        _, errors = process.communicate(b"1\n")
    assert b"[Errno 27] File too large" in errors
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


def noted(run: Path, folder: Path, spoil: dict | None = None) -> Path:
    """Notes as two processes of one life make them, of a finished run; `spoil` changes a line of the second."""
    folder.mkdir()
    configuration, data = open_run(run)
    for number in range(2):
        lines = []
        for step in range(1, configuration.steps + 1):
            rows = range(number * 4, number * 4 + 4)
            tokens = data.batches.rows(step - 1, rows)[0]
            note = {
                "step": step,
                "rows": {row: zlib.crc32(part.tobytes()) for row, part in zip(rows, tokens, strict=True)},
            }
            if number and spoil and step == 7:
                note |= spoil
            lines.append(json.dumps(note))
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + '\n{"step": 99, "ro')
    return folder


def test_notes_of_what_was_fed_are_held_against_the_order(finished: Path, tmp_path: Path):
    assert "160 sequences of 20 steps" in proof.fed_once(finished, noted(finished, tmp_path / "good"))
    for number, (spoil, said) in enumerate(
        (
            ({"rows": {4: 1, 5: 1, 6: 1, 7: 1}}, "row 4 of step 7 was not what the order"),
            ({"step": 6}, "a process went from step 6 to 6"),
            ({"rows": {}}, "step 7 was not fed whole"),
        )
    ):
        with pytest.raises(proof.DiffersError, match=said):
            proof.fed_once(finished, noted(finished, tmp_path / str(number), spoil))


def test_ends_that_differ_are_told(finished: Path, tmp_path: Path):
    same = runs.copied(finished, tmp_path / "same")
    assert "bit for bit" in proof.same_state(same, finished, 0.0)
    assert "20 logged steps" in proof.same_history(same, finished, 0.0)
    assert "by 0 of their norm" in proof.same_state(same, finished, 0.01)
    rows = runs.rows(same)
    rows[3]["loss"] *= 1.001
    (same / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(proof.DiffersError, match="the loss of step 4"):
        proof.same_history(same, finished, 0.0)
    assert proof.same_history(same, finished, 0.01)
    (same / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] != 9))
    with pytest.raises(proof.DiffersError, match=r"other steps: \[9\]"):
        proof.same_history(same, finished, 0.01)


def test_parameters_that_differ_are_told(finished: Path, workshop: Workshop, here: Here, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    runs.drop_checkpoint(other, 20)
    again = here.train(workshop.recipe(tmp_path), "--run-dir", other, "--mesh.data", 8, "--export", "none")
    assert again.code == 0, again
    with pytest.raises(proof.DiffersError, match="of the final state differs"):
        proof.same_state(other, finished, 0.0)  # another order of sums
    assert "of their norm" in proof.same_state(other, finished, 0.01)
    with pytest.raises(proof.DiffersError, match=r"differ by .* of their norm \(at most 1e-12\)"):
        proof.same_state(other, finished, 1e-12)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--kills", "0"), "--kills 0: give at least 1"),
        (("--kills", "many"), "'many'"),
        (("--processes", "3"), "global_batch=8"),
        (("--tolerance", "2"), "--tolerance 2: give a number between 0 and 1"),
        (("--stepz", "2"), "Unrecognized options"),
    ],
)
def test_mistakes_are_told(workshop: Workshop, here: Here, tmp_path: Path, flags: tuple[str, ...], said: str):
    here.cli("chaos", workshop.recipe(tmp_path), "--out", tmp_path / "out", *flags).refused(said)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_refused(workshop: Workshop, here: Here, tmp_path: Path):
    here.cli("chaos", workshop.recipe(tmp_path), "--out", tmp_path).refused("is there already")


def test_a_run_killed_right_after_a_save_has_all_its_metrics(
    workshop: Workshop, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What `meshgpt chaos` found: the figures of a step were written after its checkpoint, and by nobody then."""
    save = Checkpointer.save

    def killed(checkpoints: Checkpointer, *arguments: Any) -> None:
        save(checkpoints, *arguments)
        checkpoints.wait()
        raise KeyboardInterrupt

    flags = (workshop.recipe(tmp_path), "--run-dir", tmp_path / "run", "--steps", 8, "--export", "none")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", killed)
        assert here.train(*flags).code == 130
    assert "resuming from step 5" in here.train(*flags).out
    assert [row["step"] for row in runs.rows(tmp_path / "run")] == list(range(1, 9))


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "extra"), [(8, ()), (2, ("--elastic", "--processes", 4))])
def test_a_disturbed_run_ends_as_an_undisturbed_one(workshop: Workshop, tmp_path: Path, kills: int, extra: tuple):
    out = tmp_path / "out"
    flags = ("--kills", kills, "--seed", 1, "--out", out, "--eval-every", 100, "--check-replicas-every", 5, *extra)
    process = workshop.start("chaos", workshop.recipe(tmp_path, "gpt2"), *flags, module="meshgpt.cli")
    try:
        printed, errors = process.communicate(timeout=1200)  # two minutes on two cores that do nothing else
    finally:
        process.terminate()
    assert process.returncode in (0, 1), errors[-6000:]
    verdict = json.loads((out / "chaos.json").read_text())
    assert process.returncode == 0, (verdict["failed"], printed[-3000:], errors[-6000:])
    assert len(verdict["faults"]) == kills
    assert verdict["restarts"] >= kills // 2
    assert len(verdict["held"]) == 3
    if not extra:
        assert {fault["kind"] for fault in verdict["faults"]} == set(Kind)
        assert "bit for bit" in verdict["held"][0]
    assert Batches.iterate.__name__ == "iterate"  # the noting is the worker's alone
