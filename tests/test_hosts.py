"""Several processes as one run: where they find each other, what they refuse, and that their number changes nothing."""

import json
import re
import signal
import socket
from pathlib import Path

import pods
import pytest
import runs
from pods import Pod
from runs import Here, Workshop, last_step, wait_for

from meshgpt.config import differences
from meshgpt.distributed import processes as hosts
from meshgpt.distributed.processes import ProcessSpec
from meshgpt.errors import UserError

ELSEWHERE = {"coordinator": "10.0.0.1:8476", "processes": "4", "process_id": "2"}

STEPS = 10
SHORT = ("--steps", STEPS, "--eval-batches", 1, "--samples.prompts", "def ", "--samples.max-new-tokens", 4)


def environment(**values: str) -> dict[str, str]:
    return {f"MESHGPT_{name.upper()}": value for name, value in values.items()}


def test_flags_are_taken_out_of_a_commands_arguments():
    arguments = ["r.py", "--processes", "4", "--steps", "5", "--process-id=2", "--coordinator", "h:1"]
    assert hosts.take_flags(arguments) == (
        {"coordinator": "h:1", "processes": "4", "process_id": "2"}, ["r.py", "--steps", "5"]
    )  # fmt: skip
    with pytest.raises(UserError, match="--coordinator needs a value"):
        hosts.take_flags(["r.py", "--coordinator"])


def test_a_placement_comes_from_the_environment_and_flags_come_first():
    wanted = ProcessSpec(coordinator="10.0.0.1:8476", bind="10.0.0.1:8476", processes=4, process_id=2, deadline=300.0)
    assert hosts.process_spec({}, environment(**ELSEWHERE)) == wanted
    assert hosts.process_spec(ELSEWHERE, {}) == wanted
    other = hosts.process_spec({"process_id": "3", "bind": "0.0.0.0"}, environment(**ELSEWHERE, deadline="20"))
    assert other is not None
    assert (other.process_id, other.bind, other.deadline) == (3, "0.0.0.0:8476", 20.0)
    assert hosts.process_spec({}, {}) is None


def test_slurm_is_found_and_one_process_is_no_pod(monkeypatch: pytest.MonkeyPatch):
    for name, value in {
        "SLURM_JOB_ID": "17", "SLURM_STEP_NODELIST": "node[001-002]", "SLURM_NTASKS": "16", "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1", "JAX_COORDINATOR_PORT": "9000",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    found = hosts.process_spec({}, {})
    assert found is not None
    assert (found.coordinator, found.bind, found.processes, found.process_id) == (
        "node001:9000", "node001:9000", 16, 9,
    )  # fmt: skip
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert hosts.process_spec({}, {}) is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"processes": ""}, "--coordinator 10.0.0.1:8476 needs --processes too"),
        ({"process_id": "4"}, "--process-id 4: with --processes 4 it is one of 0 to 3"),
        ({"process_id": "two"}, "--process-id 'two' is not a number"),
        ({"coordinator": "10.0.0.1"}, "give HOST:PORT of process 0"),
        ({"coordinator": ""}, "--coordinator HOST:PORT is missing"),
        ({"deadline": "soon"}, "--deadline 'soon' is not a number"),
        ({"deadline": "inf"}, "--deadline 'inf' is not a number"),
    ],
)
def test_incomplete_placements_are_refused(changed: dict[str, str], said: str):
    with pytest.raises(UserError, match=said):
        hosts.process_spec(ELSEWHERE | changed, {})


def place(coordinator: str, bind: str) -> ProcessSpec:
    return ProcessSpec(coordinator=coordinator, bind=bind, processes=2, process_id=0, deadline=5.0)


def test_a_port_in_use_and_an_address_of_another_machine_are_named(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused(place(address, address), f"cannot listen on {address}: Address already in use")
    refused(place("192.0.2.1:8476", "192.0.2.1:8476"), "cannot listen on 192.0.2.1:8476")  # a documentation address
    loopback = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.1.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: [loopback])
    refused(place("node1:8476", "node1:8476"), "node1 is 127.0.1.1 on this machine.*--bind")


def refused(placement: ProcessSpec, said: str) -> None:
    with pytest.raises(UserError, match=said), hosts.distributed_session(placement, print):
        raise AssertionError("it joined")


def test_the_others_wait_for_process_0_and_hear_what_it_refuses(monkeypatch: pytest.MonkeyPatch):
    pod = Pod(monkeypatch, 3)
    order: list[int] = []

    def refuse() -> None:
        raise UserError("the disk is full")

    def work(number: int) -> None:
        hosts.primary_first(lambda: order.append(0), lambda: order.append(number))
        hosts.primary_first(refuse, lambda: None)

    said = pod.run(work)
    assert said == ["the disk is full", *["process 0 cannot go on: the disk is full"] * 2]
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2]


@pytest.mark.parametrize(
    ("differs", "said"),
    [
        ({"configuration": {"optim": {"peak_lr": 2.0}}}, "process 2 .* process 0: optim.peak_lr 1.0 there, 2.0 here"),
        ({"packages": {"jax": "0.11"}}, "process 2 on .* differs from process 0: jax '0.10' there, '0.11' here"),
        ({"code": "b" * 64}, r"process 2 on .* the code of meshgpt \(digest aaaaaaaaaaaa there, bbbbbbbbbbbb here\)"),
        ({}, ""),
    ],
)  # fmt: skip
def test_processes_that_differ_are_named_on_all(monkeypatch: pytest.MonkeyPatch, differs: dict, said: str):
    pod = Pod(monkeypatch, 3)
    usual = {"configuration": {"optim": {"peak_lr": 1.0}}, "packages": {"jax": "0.10"}, "code": "a" * 64}

    def mine(what: str) -> object:
        return (usual | (differs if pod.local.number == 2 else {}))[what]

    monkeypatch.setattr(hosts, "_versions", lambda: mine("packages"))
    monkeypatch.setattr(hosts, "_code_digest", lambda: mine("code"))
    results = pod.run(lambda number: hosts.check_agreement(mine("configuration"), differences))
    assert all(re.search(said, str(result)) if said else result is None for result in results), results


def test_a_folder_that_is_not_shared_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pod = Pod(monkeypatch, 2)
    for number in range(2):
        (tmp_path / str(number)).mkdir()
    (tmp_path / "0" / "run.json").write_text("{}")
    monkeypatch.setattr(hosts, "_SHARED_SECONDS", 0.0)
    results = pod.run(lambda number: hosts.check_shared(tmp_path / str(number) / "run.json"))
    assert all(
        "process 1 on" in str(result) and "give a --run-dir that all hosts share" in str(result) for result in results
    )
    monkeypatch.undo()
    alike = Pod(monkeypatch, 2)
    assert alike.run(lambda number: hosts.check_shared(tmp_path / "0" / "run.json")) == [None, None]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (1, "after 2 s nobody answers at 127.0.0.1:{port}"),
        (0, "after 2 s not all 2 processes have come to 127.0.0.1:{port}"),
    ],
)
def test_those_that_never_come_are_not_waited_for_in_silence(
    workshop: Workshop, tmp_path: Path, number: int, said: str
):
    port = pods.free_port()
    flags = ("--coordinator", f"127.0.0.1:{port}", "--processes", 2, "--process-id", number, "--deadline", 2)
    ended = workshop.run(workshop.recipe(tmp_path), "--run-dir", tmp_path / "run", *flags)
    assert ended.code == 2, ended
    assert said.format(port=port) in ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_with_different_configurations_do_not_start(workshop: Workshop, tmp_path: Path):
    recipe = workshop.recipe(tmp_path)
    pod = pods.start(workshop, 2, 1, recipe, "--run-dir", tmp_path / "run", each={1: ("--optim.peak-lr", "1")})
    for process in pods.ended(pod):
        process.refused("process 1 on", "optim.peak_lr 0.003 there, 1.0 here")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_losses_and_a_sigterm_to_one_stops_all(
    workshop: Workshop, here: Here, tmp_path: Path
):
    """1 x 8 uninterrupted against 2 x 4, stopped by a SIGTERM to the second process, and gone on with as 4 x 2."""
    recipe = workshop.recipe(tmp_path)
    flags = (recipe, "--mesh.data", 2, "--mesh.fsdp", 2, "--mesh.tensor", 2, *SHORT)
    assert here.train(*flags, "--run-dir", tmp_path / "one").code == 0
    run = tmp_path / "several"

    pod = pods.start(workshop, 2, 4, *flags, "--run-dir", run)
    assert wait_for(lambda: last_step(run) >= 2, pod[0]), pods.ended(pod)
    pod[1].send_signal(signal.SIGTERM)
    first, second = pods.ended(pod)
    assert (first.code, second.code) == (0, 0), (first, second)
    (manifest,) = (run / "checkpoints").glob("*.digests.json")
    stopped = int(manifest.name.split(".")[0])
    assert 2 <= stopped < STEPS
    assert f"stopped at step {stopped} and saved" in first.out
    assert "stopped" not in second.out

    again = pods.ended(pods.start(workshop, 4, 2, *flags, "--run-dir", run))
    assert [process.code for process in again] == [0] * 4, again
    assert f"resuming from step {stopped}" in again[0].out
    assert "8 x cpu as data=2 fsdp=2 tensor=2" in again[0].out

    ours, theirs = runs.losses(run), runs.losses(tmp_path / "one")
    assert [row[0] for row in ours] == list(range(1, STEPS + 1))
    assert [row[1] for row in ours] == pytest.approx([row[1] for row in theirs], rel=2e-5)
    assert ours[-1][2] == pytest.approx(theirs[-1][2], rel=2e-5)
    assert json.loads((run / "run.json").read_text())["finished_step"] == STEPS
    assert (run / "export" / "model.safetensors").is_file()
    assert (run / "samples.txt").read_text() == (tmp_path / "one" / "samples.txt").read_text()
