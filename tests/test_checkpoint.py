import asyncio
import dataclasses
import errno
import gc
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging as absl_logging
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from meshgpt.checkpoint import manifest
from meshgpt.checkpoint.manager import Checkpointer, Checkpointing, latest_step, read_metadata, restore_params
from meshgpt.errors import UserError

KEEP_ALL = Checkpointing(every=1, keep=100)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counters:
    skipped: jax.Array
    tokens: jax.Array


def _mesh(*shape: int) -> Mesh:
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 3)


def _state(step: int, size: int = 64) -> dict[str, Any]:
    """A state as of training, different in each step, with the values that careless copies change."""
    w_DF = jax.random.normal(jax.random.key(step), (size, 32))
    odd = jnp.array([jnp.nan, -jnp.inf, -0.0, 1e-42], jnp.float32)
    params = {"blocks": {"w_DF": w_DF, "bias_F": w_DF[0].astype(jnp.bfloat16)}, "odd": odd}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    counters = Counters(jnp.uint32(step), jnp.arange(step, step + 3, dtype=jnp.int32))
    return {"params": params, "opt_state": optimizer.init(params), "counters": counters, "step": jnp.int32(step)}


def _sharded(state: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, _spec(leaf))), state)


def _spec(leaf: Any) -> PartitionSpec:
    return PartitionSpec("fsdp", "tensor") if leaf.ndim == 2 else PartitionSpec()


def _abstract(state: Any) -> Any:
    return jax.eval_shape(lambda: state)


def _assert_same_bits(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def _saved(folder: Path, *steps: int, config: Checkpointing = KEEP_ALL) -> None:
    with Checkpointer(folder, config, report=_unexpected) as checkpointer:
        for step in steps:
            checkpointer.save(step, _state(step), {"step": step})


def _unexpected(line: str) -> None:
    raise AssertionError(line)


def _ignored(line: str) -> None:
    """A report that the test does not look at."""


def _flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def _largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_round_trip_on_another_mesh_is_exact(tmp_path: Path):
    before, after = _mesh(2, 2, 2), _mesh(1, 8, 1)
    with jax.set_mesh(before), Checkpointer(tmp_path, KEEP_ALL, report=_unexpected) as checkpointer:
        state = _sharded(_state(7), before)
        checkpointer.save(7, state, {"recipe": {"seed": 3}, "versions": ["a", None]})
    with jax.set_mesh(after), Checkpointer(tmp_path, KEEP_ALL, report=_unexpected) as checkpointer:
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=NamedSharding(after, _spec(leaf)) if leaf.ndim else None
            ),
            state,
        )
        step = checkpointer.latest()
        assert step == 7
        restored = checkpointer.restore(step, abstract)
        assert checkpointer.metadata(step) == {"recipe": {"seed": 3}, "versions": ["a", None]}
    _assert_same_bits(restored, state)
    assert restored["params"]["blocks"]["w_DF"].sharding == NamedSharding(after, PartitionSpec("fsdp", "tensor"))
    assert restored["step"].sharding == NamedSharding(after, PartitionSpec())


def test_shardings_of_eval_shape_become_those_of_the_current_mesh(tmp_path: Path):
    mesh = _mesh(2, 4, 1)
    with jax.set_mesh(mesh), Checkpointer(tmp_path, KEEP_ALL, report=_unexpected) as checkpointer:
        state = _sharded(_state(1), mesh)
        checkpointer.save(1, state, {})
        restored = checkpointer.restore(1, jax.eval_shape(lambda state: state, state))
    _assert_same_bits(restored, state)
    assert restored["params"]["blocks"]["w_DF"].sharding == NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))


def test_numbers_of_the_host_are_saved_as_jax_sees_them(tmp_path: Path):
    state = {"params": {"w": jnp.ones(3)}, "seen": 5, "share": 0.1, "host": np.arange(4, dtype=np.uint8)}
    with Checkpointer(tmp_path, KEEP_ALL, report=_unexpected) as checkpointer:
        checkpointer.save(1, state, {})
        restored = checkpointer.restore(1, _abstract(state))
    _assert_same_bits(restored, jax.tree.map(jnp.asarray, state))


def test_params_are_read_without_the_optimizer_state(tmp_path: Path):
    _saved(tmp_path, 3)
    for path in sorted((tmp_path / "3" / "opt_state").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    params = _state(3)["params"]
    _assert_same_bits(restore_params(tmp_path, 3, _abstract(params)), params)


def test_a_donated_state_is_saved_as_it_was(tmp_path: Path):
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = {"params": {"w": jnp.zeros((512, 1024))}}
    with Checkpointer(tmp_path, KEEP_ALL, report=_unexpected) as checkpointer:
        for number in range(1, 6):
            state = step(state)
            checkpointer.save(number, state, {})
            for _ in range(10):
                state = step(state)
        for number in range(1, 6):
            restored = checkpointer.restore(number, _abstract(state))
            assert np.all(np.asarray(restored["params"]["w"]) == 11 * number - 10)


def test_the_newest_and_every_nth_are_kept(tmp_path: Path):
    _saved(tmp_path, *range(2, 25, 2), config=Checkpointing(every=2, keep=3, keep_every=10))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["10", "20", "22", "24"]
    assert {int(path.name.split(".")[0]) for path in tmp_path.glob("*.json")} == {10, 20, 22, 24}


def test_nothing_waits_for_the_digests_and_nothing_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gate = threading.Event()
    write = manifest.write_manifest

    def write_slowly(folder: Path, **options: Any) -> None:
        assert gate.wait(300)
        write(folder, **options)

    _saved(tmp_path, 1)
    monkeypatch.setattr(manifest, "write_manifest", write_slowly)
    lines: list[str] = []
    with Checkpointer(tmp_path, Checkpointing(every=1, keep=1), report=lines.append) as checkpointer:
        checkpointer.save(2, _state(2), {})
        while not (tmp_path / "2").is_dir():
            time.sleep(0.01)
        assert checkpointer.steps() == [1]  # the old one stays until the new one is complete
        threading.Timer(1.2, gate.set).start()
        checkpointer.save(3, _state(3), {})
        checkpointer.wait()
        assert checkpointer.steps() == [3]
    assert len(lines) == 1
    assert re.match(r"waited [1-9]\d*\.\d s for the checkpoint before 3", lines[0])


def test_a_step_that_is_there_is_not_written_again(tmp_path: Path):
    _saved(tmp_path, 4)
    written = manifest.manifest_path(tmp_path / "4").stat().st_mtime_ns
    with Checkpointer(tmp_path, KEEP_ALL, report=_unexpected) as checkpointer:
        checkpointer.restore(4, _abstract(_state(4)))
        checkpointer.save(4, _state(4), {})
        checkpointer.save(5, _state(5), {})
        checkpointer.save(5, _state(5), {})
        assert checkpointer.steps() == [4, 5]
    assert manifest.manifest_path(tmp_path / "4").stat().st_mtime_ns == written


def test_flipped_bits_are_all_caught(tmp_path: Path):
    _saved(tmp_path, 1)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    sizes = [path.stat().st_size for path in files]
    generator = random.Random(1)
    for _ in range(200):
        path = generator.choices(files, sizes)[0]
        bit = generator.randrange(8 * path.stat().st_size)
        _flip(path, bit)
        with pytest.raises(manifest.DamagedError, match=re.escape(path.name)):
            manifest.verify(tmp_path / "1")
        _flip(path, bit)
    manifest.verify(tmp_path / "1")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: _flip(path, 1234), "does not match its digest"),
        (lambda path: os.truncate(path, 100), "has 100 bytes instead of"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.with_name("extra").touch(), "extra is not in the manifest"),
        (lambda path: manifest.manifest_path(path).touch(), "digests.json is not in the manifest"),
    ],
)
def test_a_damaged_step_is_named_and_the_one_before_is_used(tmp_path: Path, damage, message: str):
    _saved(tmp_path, 1, 2, 3)
    path = _largest_file(tmp_path / "3")
    lines: list[str] = []
    with Checkpointer(tmp_path, Checkpointing(every=1, keep=1), report=lines.append) as checkpointer:
        assert checkpointer.latest() == 3
        damage(path)
        assert latest_step(tmp_path, lines.append) == 2
        assert checkpointer.latest() == 2
        assert lines[:2] == lines[2:]
        assert f"checkpoint {tmp_path / '3'} is passed over: " in lines[0]
        assert message in lines[0]
        assert lines[1] == f"checkpoint {tmp_path / '2'} is intact and is used instead"
        _assert_same_bits(checkpointer.restore(2, _abstract(_state(2))), _state(2))
        with pytest.raises(UserError, match="cannot be used"):
            checkpointer.restore(3, _abstract(_state(3)))
        # The run goes on from 2 and reaches 3 again: the damaged folder gives way to the new one.
        checkpointer.save(3, _state(3), {})
        assert checkpointer.latest() == 3
        assert checkpointer.steps() == [3]


def test_damaged_steps_do_not_count_as_kept(tmp_path: Path):
    _saved(tmp_path, 10, 20)
    _flip(_largest_file(tmp_path / "20"), 99)
    lines: list[str] = []
    with Checkpointer(tmp_path, Checkpointing(every=5, keep=2), report=lines.append) as checkpointer:
        assert checkpointer.latest() == 10
        checkpointer.save(15, _state(15), {})
        assert checkpointer.latest() == 15
        checkpointer.save(25, _state(25), {})
        checkpointer.wait()
        assert checkpointer.steps() == [15, 25]


def test_an_unfinished_first_save_is_a_fresh_start(tmp_path: Path):
    _saved(tmp_path, 1)
    manifest.manifest_path(tmp_path / "1").unlink()
    lines: list[str] = []
    assert latest_step(tmp_path, lines.append) is None
    assert "its save did not finish" in lines[0]
    assert latest_step(tmp_path / "not there", _unexpected) is None


def test_a_folder_with_damaged_steps_only_is_refused(tmp_path: Path):
    _saved(tmp_path, 1)
    path = _largest_file(tmp_path / "1")
    _flip(path, 0)
    with pytest.raises(UserError, match=rf"{path.name} does not match.*move .* away to start afresh"):
        latest_step(tmp_path, _ignored)
    with (
        Checkpointer(tmp_path, KEEP_ALL, report=_ignored) as checkpointer,
        pytest.raises(UserError, match=path.name),
    ):
        checkpointer.latest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state["params"]["blocks"].update(w_DF=jnp.ones((64, 16))),
            r"params/blocks/w_DF is float32\[64, 32\] in it and float32\[64, 16\] in this run",
        ),
        (
            lambda state: state["params"].update(odd=state["params"]["odd"].astype(jnp.bfloat16)),
            r"params/odd is float32\[4\] in it and bfloat16\[4\] in this run",
        ),
        (lambda state: state["params"].pop("odd"), r"params/odd is float32\[4\] in it and absent in this run"),
        (lambda state: state["params"].update(more=jnp.ones(1)), r"params/more is absent in it and float32\[1\]"),
        (lambda state: state.update(average=jnp.ones(1)), "holds no 'average'"),
    ],
)
def test_a_state_of_another_form_is_refused(tmp_path: Path, change, message: str):
    _saved(tmp_path, 1)
    other = _state(1)
    change(other)
    with (
        Checkpointer(tmp_path, KEEP_ALL, report=_unexpected) as checkpointer,
        pytest.raises(UserError, match=message),
    ):
        checkpointer.restore(1, _abstract(other))


def test_a_state_with_unusable_names_is_refused(tmp_path: Path):
    with Checkpointer(tmp_path, KEEP_ALL, report=_unexpected) as checkpointer:
        for state in (
            {"params": {"a b": 1}},
            {"params": {"..": 1}},
            {"metadata": 1},
            {"params": {"a/b": 1, "a": {"b": 2}}},
        ):
            with pytest.raises(ValueError, match="state"):
                checkpointer.save(1, state, {})
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fields", [{"every": 0}, {"keep": 0}, {"keep_every": 0}, {"every": 4, "keep_every": 10}])
def test_settings_that_cannot_work_are_refused(fields: dict[str, int]):
    with pytest.raises(UserError, match=r"checkpointing\."):
        Checkpointing(**fields)


def test_metadata_of_a_folder_that_is_none(tmp_path: Path):
    with pytest.raises(UserError, match=r"is .* the checkpoints folder of a run"):
        read_metadata(tmp_path, 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder where no file of 2 MB fits: a tmpfs of that size, or a file size limit where none can be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False)
    if mount.returncode == 0:
        yield folder
        subprocess.run(["umount", folder], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    yield folder
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_ends_in_one_clear_message(small_disk: Path, caplog: pytest.LogCaptureFixture):
    folder = small_disk / "checkpoints"
    checkpointer = Checkpointer(folder, KEEP_ALL, report=_unexpected)
    checkpointer.save(1, _state(1), {})
    checkpointer.save(2, _state(2, size=100_000), {})
    with pytest.raises(UserError, match=f"cannot save to {folder}: the disk .* is full.*Free space"):
        checkpointer.close()
    assert list(folder.glob("*orbax-checkpoint-tmp*"))
    assert not caplog.records  # orbax has logged the traceback of the same error, which nobody needs twice
    with Checkpointer(folder, KEEP_ALL, report=_unexpected) as checkpointer:
        assert not list(folder.glob("*orbax-checkpoint-tmp*"))
        assert checkpointer.latest() == 1
        _assert_same_bits(checkpointer.restore(1, _abstract(_state(1))), _state(1))
        checkpointer.save(2, _state(2), {})
        assert checkpointer.latest() == 2


@pytest.mark.parametrize(("code", "message"), [(errno.EDQUOT, "is full"), (errno.EROFS, "Make it writable")])
def test_a_disk_that_fails_at_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str):
    _saved(tmp_path, 1)

    def fail(folder: Path, **_: Any) -> None:
        raise OSError(code, os.strerror(code))

    with Checkpointer(tmp_path, KEEP_ALL, report=_ignored) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "write_manifest", fail)
            checkpointer.save(2, _state(2), {})
            with pytest.raises(UserError, match=message):
                checkpointer.wait()
        assert checkpointer.latest() == 1
        checkpointer.save(2, _state(2), {})
        assert checkpointer.latest() == 2


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        Checkpointer(tmp_path / "file" / "checkpoints", KEEP_ALL, report=_unexpected)


def test_leftovers_of_interrupted_saves_are_removed(tmp_path: Path):
    _saved(tmp_path, 1)
    (tmp_path / "2.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (tmp_path / "2.digests.json.tmp").touch()
    (tmp_path / "notes.txt").touch()
    _saved(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "1.digests.json", "notes.txt"]


def test_no_thread_outlives_close(tmp_path: Path):
    before = set(threading.enumerate())
    _saved(tmp_path, 1, 2)
    assert set(threading.enumerate()) <= before


SAVES_FOREVER = """
import sys
from pathlib import Path
from tests.test_checkpoint import _state, _unexpected
from meshgpt.checkpoint import Checkpointer, Checkpointing
checkpointer = Checkpointer(Path(sys.argv[1]), Checkpointing(every=1, keep=2), report=print)
step = checkpointer.latest() or 0
while True:
    step += 1
    checkpointer.save(step, _state(step, size=20_000), {"step": step})
    print("complete", step - 1, flush=True)
    if step == int(sys.argv[2]):
        break
"""


def _saving_process(folder: Path, last_step: int) -> subprocess.Popen[str]:
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SAVES_FOREVER, str(folder), str(last_step)]
    return subprocess.Popen(command, env=environment, cwd=root, stdout=subprocess.PIPE, text=True)


def test_killed_in_a_save_the_newest_intact_step_is_exact(tmp_path: Path):
    generator = random.Random(5)
    unfinished = 0
    for _ in range(40):
        with _saving_process(tmp_path, -1) as process:
            assert process.stdout is not None
            while not process.stdout.readline().startswith("complete"):
                assert process.poll() is None
            time.sleep(generator.uniform(0, 0.4))
            os.kill(process.pid, signal.SIGKILL)
            said = [line.split() for line in process.stdout if line.endswith("\n")]  # the kill may have cut the last
            complete = [int(words[1]) for words in said if words[0] == "complete"]
        names = {path.name for path in tmp_path.iterdir()}
        step = latest_step(tmp_path, _ignored)
        assert step is not None or not complete
        assert (step or 0) >= max(complete, default=0)
        unfinished += names != {f"{s}{suffix}" for s in (step, (step or 0) - 1) for suffix in ("", manifest.SUFFIX)}
        if step is not None:
            state = _state(step, size=20_000)
            with Checkpointer(tmp_path, Checkpointing(every=1), report=_ignored) as checkpointer:
                _assert_same_bits(checkpointer.restore(step, _abstract(state)), state)
        if unfinished == 4:  # so many kills did hit a save
            return
    pytest.fail(f"only {unfinished} of 40 kills hit a save")


def test_a_process_that_ends_without_close_does_not_hang(tmp_path: Path):
    process = _saving_process(tmp_path, 3)
    process.communicate(timeout=300)
    assert process.returncode == 0
    assert latest_step(tmp_path, _ignored) in (2, 3)


def test_only_records_of_orbax_are_silenced(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    _saved(tmp_path)
    absl_logging.warning("from elsewhere")
    assert [record.message for record in caplog.records] == ["from elsewhere"]


@pytest.mark.parametrize(("text", "heard"), [("full [os_error_code='28']", 0), ("something else", 1)])
def test_writes_that_fail_beside_the_one_that_is_reported_are_silent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, heard: int
):
    _saved(tmp_path)
    loop = asyncio.new_event_loop()
    loop.create_future().set_exception(ValueError(text))  # and nobody asks for it
    gc.collect()
    loop.close()
    assert len([record for record in caplog.records if record.name == "asyncio"]) == heard
