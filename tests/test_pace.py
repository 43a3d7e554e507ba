"""Which of several processes is slow: what each tells, and that the slow one is named."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pods
import pytest
import runs
from runs import Workshop

from meshgpt.distributed import heartbeat, processes, stragglers
from meshgpt.distributed.heartbeat import Heartbeat
from meshgpt.distributed.mesh import MeshShape, make_mesh
from meshgpt.distributed.stragglers import StragglerMonitor


def test_what_a_process_does_alone_is_its_time_without_waiting(monkeypatch: pytest.MonkeyPatch):
    now = [50.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    sign = Heartbeat({})
    sign.begin(0)
    for step in range(1, 6):
        now[0] += 0.5
        with sign.waiting():
            now[0] += 2.0
        sign.beat(step)
        with sign.busy(heartbeat.SAVING):
            now[0] += 7.0
    assert sign.step_seconds == pytest.approx(2.5)
    assert sign.own_seconds() == pytest.approx(0.5)
    assert sign.own_seconds() == 0.0  # nothing new


def test_the_slowest_is_in_the_metrics_and_told_once(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    told = {0: [0.01, "a"], 1: [0.3, "node-7"], 2: [0.02, "c"]}
    monkeypatch.setattr(
        processes, "gather_text", lambda name, text: {n: json.dumps(value) for n, value in told.items()}
    )
    sign = Heartbeat({})
    sign._spent, sign._timed = 1.0, 1  # a step takes a second
    watched = StragglerMonitor(sign, said.append)
    assert watched.metrics(1) == {}  # one process
    watched.several = True
    figures = watched.metrics(1)
    assert figures == {
        "process_seconds/0": 0.01, "process_seconds/1": 0.3, "process_seconds/2": 0.02, "slowest_process": 1,
        "slowest_process_seconds": 0.3,
    }  # fmt: skip
    assert watched.metrics(2) == figures
    assert said == [
        "process 1 on node-7 is slow: 0.3 s of a step are its own, and 0.02 s elsewhere; all others wait for it"
    ]
    told[1] = [0.09, "node-7"]  # more than the others, and little of a step
    quiet = StragglerMonitor(sign, said.append)
    quiet.several = True
    assert quiet.metrics(1)["slowest_process"] == 1
    assert len(said) == 1
    monkeypatch.setattr(processes, "gather_text", lambda name, text: {})
    assert quiet.metrics(2) == {}  # not process 0


def test_the_probe_runs_on_each_device_whatever_mesh_is_set():
    with jax.set_mesh(make_mesh(MeshShape(data=2, fsdp=4))):
        assert 0 < stragglers._probe() < 5
    assert len(stragglers._work()[1]) == 8


def test_process_0_hears_those_that_are_in_time(monkeypatch: pytest.MonkeyPatch):
    from test_hosts import Pod

    pod = Pod(monkeypatch, 3)
    pod.key_value_dir_get = lambda prefix: [item for item in list(pod.values.items()) if item[0].startswith(prefix)]
    pod.key_value_delete = lambda prefix: None
    everyone = threading.Barrier(3, timeout=60)

    def work(number: int) -> dict[int, str]:
        found = processes.gather_text("a", f"I am {number}", seconds=10)
        if number == 1:
            processes.gather_text("b", "here")
        everyone.wait()
        return found | (processes.gather_text("b", "here", seconds=0.01) if number == 0 else {})

    first, *others = pod.run(work)
    assert first == {0: "here", 1: "here", 2: "I am 2"}
    assert others == [{}, {}]


SLOW_READER = """
import os, sys, time
from meshgpt import train
from meshgpt.data.pipeline import Batches
iterate = Batches.iterate
def slowly(*arguments):
    for rows in iterate(*arguments):
        if os.environ["MESHGPT_PROCESS_ID"] == "1":
            time.sleep(0.3)
        yield rows
Batches.iterate = slowly
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_host_that_reads_slowly_is_named(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    start = subprocess.Popen
    monkeypatch.setattr(
        pods.subprocess,
        "Popen",
        lambda command, **rest: start([sys.executable, "-c", SLOW_READER, *command[3:]], **rest),
    )
    run = tmp_path / "run"
    flags = ("--steps", 8, "--log-every", 4, "--export", "none", "--samples.prompts", "--eval-every", 100)
    first, second = pods.ended(pods.start(workshop, 2, 1, workshop.recipe(tmp_path), "--run-dir", run, *flags))
    assert (first.code, second.code) == (0, 0), (first, second)
    rows = {row["step"]: row for row in runs.rows(run)}
    for step in (4, 8):
        assert rows[step]["slowest_process"] == 1
        assert rows[step]["process_seconds/1"] > 0.3
        assert rows[step]["process_seconds/0"] < rows[step]["process_seconds/1"]
    assert "process 1 on" in " ".join(first.out.split())
