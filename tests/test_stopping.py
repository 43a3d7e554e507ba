"""SIGTERM and Ctrl-C wherever they come, to one process and to a pod; and that nobody leaves a pod too early."""

import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pods
import pytest
from runs import Ended, Workshop, last_step, wait_for

from meshgpt.distributed import stopping

GUARD = 300  # seconds, against a hang
SHORT = (
    "--mesh.data", 2, "--eval-every", 1000, "--eval-batches", 1, "--export", "none",
    "--optim.warmup-steps", 0,
)  # fmt: skip


def becomes(condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + GUARD
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


def test_a_stop_waits_for_the_next_point_and_a_second_ctrl_c_does_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stopping, "_HURRY_SECONDS", GUARD)  # after which it would end pytest
    with pytest.raises(KeyboardInterrupt), stopping.deferred() as stop:  # noqa: PT012
        assert not stop.asked()
        signal.raise_signal(signal.SIGINT)
        assert becomes(stop.asked)
        signal.raise_signal(signal.SIGTERM)  # asks for the same again
        time.sleep(0.1)
        assert stop.asked()
        with pytest.raises(stopping.Stopped):
            stopping.check()
        signal.raise_signal(signal.SIGINT)
        time.sleep(GUARD)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    stopping.check()  # nothing listens any more


def test_what_is_saved_is_left_at_once_and_so_is_what_nobody_defers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stopping, "_UNWIND_SECONDS", GUARD)
    with pytest.raises(KeyboardInterrupt), stopping.listening():  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        time.sleep(GUARD)
    assert stopping.saved_text() is None
    with pytest.raises(KeyboardInterrupt), stopping.deferred() as stop:  # noqa: PT012
        stop.asked()
        stop.saved("stopped")
        signal.raise_signal(signal.SIGTERM)
        time.sleep(GUARD)
    assert stopping.saved_text() == "stopped"


def disturbed(
    workshop: Workshop, tmp_path: Path, *flags: object, **disturbances: Any
) -> tuple[list[Any], Path, Callable[[str], bool]]:
    """A pod of two with a disturbance: its processes, its run's folder, and whether `tests.disturbed` made a mark."""
    notes = tmp_path / "notes"
    notes.mkdir()
    asked = json.dumps({"folder": str(notes), **disturbances})
    run = tmp_path / "run"
    recipe = workshop.recipe(tmp_path)
    recipe.write_text(re.sub(r"samples=.*", "samples=Samples(prompts=()),", recipe.read_text()))
    pod = pods.start(workshop, 2, 1, asked, recipe, *SHORT, *flags, "--run-dir", run, module="tests.disturbed")
    return pod, run, lambda mark: (notes / mark).exists()


def ended_after(pod: list[Any], seconds: float) -> list[Ended]:
    """How the processes ended, which must be so soon."""
    begun = time.monotonic()
    ended = pods.ended(pod, GUARD)
    assert time.monotonic() - begun < seconds, ended
    return ended


@pytest.mark.slow
def test_nobody_leaves_before_the_digests_are_made(workshop: Workshop, tmp_path: Path):
    """At the end of a run without export, with digests that take longer than JAX's wait at the end of a process."""
    pod, run, _ = disturbed(workshop, tmp_path, "--steps", 2, digesting=[0, 8], shutdown=3)
    ended = pods.ended(pod, GUARD)
    assert [process.code for process in ended] == [0, 0], ended
    (written,) = (run / "checkpoints").glob("*.digests.json")
    files = {str(run / "checkpoints" / "2" / path) for path in json.loads(written.read_text())["files"]}
    by = [set((tmp_path / "notes" / f"digested-{number}").read_text().splitlines()) for number in range(2)]
    assert by[0] | by[1] == files  # each made its part ...
    assert not by[0] & by[1]
    assert all(by)
    assert json.loads((run / "run.json").read_text())["finished_step"] == 2


@pytest.mark.slow
def test_a_stopped_pod_keeps_the_checkpoint_whose_digests_take_long(workshop: Workshop, tmp_path: Path):
    flags = ("--steps", 5000, "--checkpointing.every", 5000)
    pod, run, has = disturbed(workshop, tmp_path, *flags, digesting=[0, 8], shutdown=3)
    assert wait_for(lambda: last_step(run) >= 2, pod[0], GUARD), pods.ended(pod)
    pod[1].send_signal(signal.SIGTERM)
    assert becomes(lambda: has("digesting-0"))
    pod[0].send_signal(signal.SIGTERM)  # once more, while it makes digests
    ended = pods.ended(pod, GUARD)
    assert [process.code for process in ended] == [0, 0], ended
    (written,) = (run / "checkpoints").glob("*.digests.json")
    assert f"stopped at step {int(written.name.split('.')[0]):,} and saved" in ended[0].out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "value", "to", "number"),
    [
        ("preparing", [0, 1e6], 1, signal.SIGTERM),  # process 1 waits for process 0, and hears it
        ("compiling", 1, 0, signal.SIGINT),  # process 0 waits for process 1, whose main thread is not in Python
    ],
)
def test_a_pod_stops_before_its_first_step(
    workshop: Workshop, tmp_path: Path, kind: str, value: Any, to: int, number: signal.Signals
):
    pod, run, has = disturbed(workshop, tmp_path, "--steps", 5000, **{kind: value})
    by = value if isinstance(value, int) else value[0]
    assert becomes(lambda: has(f"{kind}-{by}") or pod[by].poll() is not None)
    time.sleep(1)  # so that the other one waits for it
    pod[to].send_signal(number)
    for process in ended_after(pod, 200):
        assert process.code == 130, process
        assert "interrupted; the same command goes on from what is done" in process.err
    assert last_step(run) == 0


@pytest.mark.slow
def test_a_pod_stops_in_its_export_which_is_owed(workshop: Workshop, tmp_path: Path):
    pod, run, has = disturbed(workshop, tmp_path, "--steps", 2, exporting=0)
    assert becomes(lambda: has("exporting-0") or pod[0].poll() is not None)
    pod[1].send_signal(signal.SIGTERM)
    first, second = ended_after(pod, 200)
    assert (first.code, second.code) == (0, 0), (first, second)
    assert "stopped at step 2 and saved; to go on: " in first.out
    assert json.loads((run / "run.json").read_text())["finished_step"] is None
