"""The supervisor, with stand-ins for the trainer: what dies, hangs, or is stopped, and what comes of it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import ROOT, Workshop

from meshgpt import cli, recipe
from meshgpt.cli import launch
from meshgpt.distributed import heartbeat, supervisor
from meshgpt.distributed.heartbeat import (
    SAVING,
    STARTING,
    STEPPING,
    HangTimeouts,
    HeartbeatRecord,
    Life,
    Listener,
    useful_seconds,
)
from meshgpt.distributed.supervisor import Layout, Patience, Supervisor
from meshgpt.errors import UserError

# A trainer of 10 steps of 20 ms that saves after each; `fault` is the body of a function of its number, life and step.
# As in a real run none takes its first step before all have begun, from the same checkpoint.
TRAINER = """
import json, os, signal, sys, time
from pathlib import Path
from meshgpt.distributed.heartbeat import Heartbeat, VARIABLE
folder, number = Path({folder!r}), int(os.environ.get("MESHGPT_PROCESS_ID", 0))
life = len(json.loads(os.environ[VARIABLE])["lives"])
saved = folder / "saved"
heartbeat, asked = Heartbeat(), []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
def fault(step):
{fault}
fault(0)
first = int(saved.read_text()) if saved.exists() else 0
(folder / f"began-{{life}}-{{number}}").touch()
while len(list(folder.glob(f"began-{{life}}-*"))) < int(os.environ.get("MESHGPT_PROCESSES", 1)):
    time.sleep(0.005)
heartbeat.begin(first)
for step in range(first + 1, 11):
    time.sleep(0.02)
    heartbeat.beat(step)
    fault(step)
    if number == 0:
        saved.write_text(str(step - {lost}))
    if asked:
        (folder / f"stopped-{{number}}").touch()
        break
"""
QUICK = Patience(pause=0.01, poll=0.01, timeouts=HangTimeouts(seconds=2.0, start=60.0, busy=60.0), grace=5.0)


class Launched:
    """A supervisor over stand-ins, and what it said."""

    def __init__(self, folder: Path, fault: str = "pass", lost: int = 0, **settings) -> None:
        self.folder, self.said, self.begun = folder, [], []
        body = "\n".join(f"    {line}" for line in fault.splitlines())
        text = TRAINER.format(folder=str(folder), fault=body, lost=lost)
        processes = settings.pop("processes", 3)
        patience = settings.pop("patience", QUICK)

        def command(processes: int, begun: bool) -> list[str]:
            self.begun.append((processes, begun))
            return [sys.executable, "-c", text]

        self.supervisor = Supervisor(
            command, Layout(processes=processes), folder / "run", patience, self.said.append, **settings
        )

    @property
    def restarts(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "run" / "restarts.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_one_that_dies_takes_all_down_and_the_run_goes_on_from_what_is_saved(tmp_path: Path):
    fault = (
        "if (life, step) == (0, 5):\n"
        "    if number == 2: print('ouch', flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
        "    time.sleep(60)"
    )
    launched = Launched(tmp_path, fault, lost=1)
    begun = time.monotonic()
    assert launched.supervisor.run() == 0
    assert time.monotonic() - begun < 40  # the others were not waited for
    assert launched.begun == [(3, False), (3, True)]
    (restart,) = launched.restarts
    assert "process 2 was killed by SIGKILL" in restart["reason"]
    assert "process-2.log ends: ouch" in restart["reason"]
    assert (restart["restart"], restart["began_at_step"], restart["processes"]) == (1, 0, 3)
    assert restart["last_step"] == 5
    first, second = launched.supervisor.lives
    assert first.last >= second.first > 0
    assert second.last == 10
    assert "restart 1, 3 processes, in 0.01 s" in launched.said[0]
    assert "1 restarts, goodput" in launched.said[-1]


def test_a_process_that_stops_stepping_is_ended_within_the_time_that_steps_teach(tmp_path: Path):
    launched = Launched(tmp_path, "if (life, step) == (0, 6 - number): time.sleep(3600)", processes=2)
    begun = time.monotonic()
    assert launched.supervisor.run() == 0
    assert time.monotonic() - begun < 60  # not an hour
    (restart,) = launched.restarts
    assert restart["reason"].startswith(
        "process 1 hangs: no sign of life for 2 s while stepping after step 5; a step takes 0.0"
    )


def test_a_process_that_was_stopped_by_a_signal_is_named(tmp_path: Path):
    fault = "if (life, number, step) == (0, 1, 4): os.kill(os.getpid(), signal.SIGSTOP)"
    launched = Launched(tmp_path, fault, processes=2)
    assert launched.supervisor.run() == 0
    assert "process 1 is stopped: no sign of life" in launched.restarts[0]["reason"]


def test_a_users_mistake_is_not_restarted(tmp_path: Path):
    launched = Launched(tmp_path, "if number == 1: print('error: no such thing'); sys.exit(2)\ntime.sleep(number * 60)")
    assert launched.supervisor.run() == 2
    assert launched.begun == [(3, False)]
    assert "process 1 ended with code 2" in launched.said[0]
    assert "error: no such thing" in launched.said[0]
    assert "not restarted" in launched.said[0]


def test_what_gains_nothing_is_given_up_and_what_gains_is_not(tmp_path: Path):
    patience = Patience(max_restarts=2, pause=0.01, poll=0.01)
    hopeless = Launched(tmp_path, "if number == 0: sys.exit(7)\ntime.sleep(60)", processes=2, patience=patience)
    assert hopeless.supervisor.run() == 7
    assert len(hopeless.begun) == 3
    assert "gave up after 2 restarts in a row without a checkpoint gained" in hopeless.said[-1]
    assert ["in 0.01 s" in hopeless.said[0], "in 0.02 s" in hopeless.said[1]] == [True, True]
    (tmp_path / "b").mkdir()
    slow = Launched(tmp_path / "b", "if step and step == first + 2: sys.exit(7)", processes=1, patience=patience)
    assert slow.supervisor.run() == 0
    assert len(slow.begun) == 10  # nine deaths, each a step further


def test_elastic_goes_on_with_fewer(tmp_path: Path):
    fault = "if step == 3 and number == 2: os.kill(os.getpid(), signal.SIGKILL)"
    launched = Launched(tmp_path, fault, fewer=lambda now: now - 1)
    assert launched.supervisor.run() == 0
    assert launched.begun == [(3, False), (2, True)]
    assert launched.restarts[0]["processes"] == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_all_end_saved(tmp_path: Path, number: int):
    fault = f"if (number, step) == (0, 2): os.kill(os.getppid(), {int(number)})\ntime.sleep(0.5)"
    launched = Launched(tmp_path, fault, processes=2)
    assert launched.supervisor.run() == 0
    assert {path.name for path in tmp_path.glob("stopped-*")} == {"stopped-0", "stopped-1"}
    assert not (tmp_path / "run" / "restarts.jsonl").exists()


def test_a_save_that_makes_progress_is_not_killed_after_its_grace(tmp_path: Path):
    fault = """if step == 3 and number == 0:
    os.kill(os.getppid(), signal.SIGTERM)
    with heartbeat.busy("saving"):
        for _ in range(16):
            time.sleep(0.5)
            heartbeat.alive()"""
    launched = Launched(tmp_path, fault, patience=Patience(poll=0.01, grace=5.0))
    assert launched.supervisor.run() == 0
    assert (tmp_path / "stopped-0").exists()


def test_one_that_ignores_the_signal_is_killed_after_its_grace(tmp_path: Path):
    patience = Patience(grace=0.3, poll=0.01)
    fault = "if (number, step) == (0, 1): os.kill(os.getppid(), signal.SIGTERM)\nwhile step: time.sleep(1)"
    launched = Launched(tmp_path, fault, processes=2, patience=patience)
    assert launched.supervisor.run() == 1
    assert "killed before they had saved" in launched.said[-1]


def test_no_process_outlives_a_supervisor_that_is_killed(tmp_path: Path):
    script = (
        "import sys; from pathlib import Path; from test_supervisor import Launched\n"
        'Launched(Path(sys.argv[1]), \'if not step: (folder / f"pid-{number}").write_text(str(os.getpid()))\\n'
        "time.sleep(0.5)', processes=2).supervisor.run()"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=environment) as process:
        until = time.monotonic() + 60
        while not (tmp_path / "saved").exists() and time.monotonic() < until:
            time.sleep(0.02)
        process.kill()
    pids = [int(path.read_text()) for path in tmp_path.glob("pid-*")]
    assert len(pids) == 2
    while any(map(_alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(_alive, pids))
    assert (tmp_path / "stopped-0").exists()  # it had the time to save


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("lives", "seconds"),
    [
        ([], 0),
        ([Life()], 0),
        ([Life(first=0, last=10, step_seconds=2.0)], 20),
        # Steps 8 to 10 were done again, faster.
        ([Life(first=0, last=10, step_seconds=2.0), Life(first=7, last=20, step_seconds=1.0)], 7 * 2 + 13),
        # A start that came to nothing, then one from a step before all others: the newest checkpoint was damaged.
        (
            [
                Life(first=0, last=10, step_seconds=2.0),
                Life(),
                Life(first=8, last=12, step_seconds=1.0),
                Life(first=4, last=5, step_seconds=3.0),
            ],
            4 * 2 + 3,
        ),
    ],
)  # fmt: skip
def test_time_is_useful_once(lives: list[Life], seconds: float):
    assert useful_seconds(lives) == seconds


def test_a_step_is_timed_without_its_compilation_saves_and_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    path = tmp_path / "pulse"
    earlier = Life(first=0, last=5, step_seconds=4.0)
    sign = heartbeat.Heartbeat(heartbeat.orders(path, time.time() - 100, [earlier]))
    assert heartbeat.read(path) is None
    sign.begin(3)
    for step, seconds in ((4, 60.0), (5, 2.0), (6, 2.0)):
        now[0] += seconds
        sign.beat(step)
        with sign.busy(SAVING):
            assert heartbeat.read(path).doing == SAVING
            now[0] += 30
    read = heartbeat.read(path)
    assert (read.first, read.last, read.step_seconds, read.doing) == (3, 6, 2.0, STEPPING)
    figures = sign.metrics()
    assert figures["restarts"] == 1
    assert figures["goodput"] == pytest.approx((3 * 4 + 3 * 2) / 100, abs=0.01)
    unwatched = heartbeat.Heartbeat({})
    unwatched.begin(0)
    unwatched.beat(1)
    assert unwatched.metrics() == {}


def _heard(
    signs: list[HeartbeatRecord | None], seconds: float, alive: Callable[[int], bool] = lambda number: True
) -> str:
    """What a listener says that hears the same signs for so long."""
    now = [0.0]
    listener = Listener(HangTimeouts(seconds=30.0, start=1000.0, busy=500.0), lambda: now[0])
    running = [SimpleNamespace(pid=2**30, poll=lambda n=n: None if alive(n) else 0) for n in range(len(signs))]
    assert listener.hung(signs, running) == ""
    now[0] = seconds
    return listener.hung(signs, running)


def test_each_part_of_a_run_has_its_own_patience():
    step = HeartbeatRecord(first=0, last=9, step_seconds=1.0, doing=STEPPING, count=9)
    slow = HeartbeatRecord(first=0, last=9, step_seconds=10.0, doing=STEPPING, count=9)
    behind = HeartbeatRecord(first=0, last=8, step_seconds=1.0, doing=STEPPING, count=8)
    saving = HeartbeatRecord(first=0, last=9, step_seconds=1.0, doing=SAVING, count=9)
    assert _heard([step, step], 29) == ""
    assert "process 0 hangs" in _heard([step, step], 31)
    assert "process 1 hangs" in _heard([step, behind], 31)  # the others wait for it
    assert _heard([slow, slow], 199) == ""
    assert "a step takes 10 s" in _heard([slow, slow], 201)
    assert _heard([saving, step], 499) == ""  # what the one saves, the other has to wait for
    assert "while saving" in _heard([saving, saving], 501)
    assert _heard([None, None], 999) == ""
    assert "while starting" in _heard([None, HeartbeatRecord(first=0, doing=STARTING)], 1001)
    assert _heard([step, step], 499, lambda number: number == 0) == ""  # one has ended well


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--processes", "0"), "--processes 0: give at least 1"),
        (("--processes", "two"), "'two'"),
        (("--max-restarts", "-1"), "--max-restarts -1: give a number of 0 or more"),
        (("--hang-seconds", "-2"), "--hang-seconds -2.0: give a number of 0 or more"),
        (("--deadline-seconds", "-1"), "--deadline -1.0: give a number of 0 or more"),
        (("--deadline-seconds", "nan"), "--deadline nan: give a finite number"),
        (("--deadline-seconds", "soon"), "'soon'"),
        (("--port", "99999"), "--port 99999: give a port"),
        (("--procs", "2"), "--procs"),
        (("--processes", "3"), "mesh data=2 fsdp=1 tensor=1 needs 2 devices, and there are 3"),
        (("--processes", "2", "--devices", "4"), "needs 2 devices, and there are 8"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
):
    run = tmp_path / "run"
    words = ["launch", *flags, str(workshop.recipe(tmp_path)), "--mesh.data", "2", "--run-dir", str(run)]
    try:
        code = cli.main(words)
    except SystemExit as end:  # of a value of another type
        code = end.code
    assert code == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not run.exists()


@pytest.mark.parametrize(("flags", "told"), [((), "77"), (("--deadline-seconds", "12.5"), "12.5")])
def test_the_deadline_of_the_processes_is_the_flag_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], told: str
):
    monkeypatch.setenv("MESHGPT_DEADLINE", "77")
    patience = recipe.take(launch.Arguments, ["--processes", "2", *flags, "recipe.py"], "test")[0].patience
    fault = '(folder / f"told-{number}").write_text(os.environ["MESHGPT_DEADLINE"])'
    assert Launched(tmp_path, fault, processes=2, patience=patience).supervisor.run() == 0
    assert [(tmp_path / f"told-{number}").read_text() for number in range(2)] == [told, told]


def test_what_a_restart_runs(workshop: Workshop, tmp_path: Path):
    rest = [str(workshop.recipe(tmp_path)), "--mesh.data", "4", "--resume", "never"]
    run = recipe.parse(rest, "test")
    build = launch.command(rest, run, 4)
    assert build(4, False)[3:] == rest
    assert build(4, True)[3:] == [*rest, "--resume", "auto"]
    assert build(2, True)[3:] == [*rest, "--mesh.data=-1", "--resume", "auto"]
    again = recipe.parse(build(2, True)[3:], "test")
    assert (again.mesh.data, again.resume) == (-1, "auto")
    fewer = launch.fewer(run, 1)
    assert [fewer(4), fewer(2), fewer(1)] == [2, 1, 1]  # a batch of 8 cannot be cut in 3
    plain = recipe.parse(rest[:1], "test")
    assert launch.command(rest[:1], plain, 4)(2, True)[3:] == rest[:1]


def test_a_port_in_use_ends_all_with_one_message(workshop: Workshop, tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = workshop.run(
            "launch", "--processes", 2, "--port", port, workshop.recipe(tmp_path), "--run-dir", tmp_path / "run",
            module="meshgpt.cli",
        )  # fmt: skip
    assert ended.code == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in ended.err
    assert "not restarted" in ended.err


JOINS = """
import sys
from meshgpt.distributed import processes
from meshgpt.errors import exit_code
def command():
    with processes.distributed_session(processes.process_spec({}), print):
        pass
sys.exit(processes.leave(exit_code(command)))
"""


def test_a_port_that_the_supervisor_chose_and_lost_is_another_one_and_no_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(supervisor, "_ROOT_CAUSE_SECONDS", 0.1)
    said: list[str] = []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = [taken.getsockname()[1], supervisor._free_port()]
        monkeypatch.setattr(supervisor, "_free_port", lambda: ports.pop(0))
        watching = Supervisor(
            lambda processes, begun: [sys.executable, "-c", JOINS],
            Layout(processes=2, devices=1), tmp_path / "run", Patience(max_restarts=0), said.append,
            fewer=lambda now: now - 1, quiet=True,
        )  # fmt: skip
        assert watching.run() == 0
    assert ports == []
    assert said == ["another program has taken the coordinator's port; trying another one"]
    assert len(watching.lives) == 1
    assert "Address already in use" in (tmp_path / "run" / "logs" / "process-0.log").read_text()
    assert not (tmp_path / "run" / "restarts.jsonl").exists()


def test_ports_are_not_tried_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervisor, "_MOST_PORTS", 2)
    monkeypatch.setattr(supervisor, "_ROOT_CAUSE_SECONDS", 0.0)
    patience = Patience(max_restarts=1, pause=0.01, poll=0.01)
    launched = Launched(tmp_path, "if number == 0: sys.exit(4)\ntime.sleep(60)", processes=2, patience=patience)
    assert launched.supervisor.run() == 4
    assert len(launched.begun) == 4
    assert len(launched.restarts) == 1


def test_help_needs_no_recipe(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        launch.launch(["--help"])
    assert end.value.code == 0
    assert "--elastic" in capsys.readouterr().out
    with pytest.raises(UserError, match="which recipe"):
        launch.launch(["--processes", "2"])
