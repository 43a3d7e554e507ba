"""Training runs as their user sees them: what they leave, how they stop, how they go on, and what they refuse."""

import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from runs import Here, Workshop, assert_same_end, copied, drop_checkpoint, last_step, make_store, saved_params, wait_for

from meshgpt import train
from meshgpt.config import Run, to_json
from meshgpt.training.run_folder import RunFolder

KEYS = {"step", "tokens", "loss", "grad_norm", "learning_rate", "tokens_per_second"}
FLAGS = (
    *("--steps", "--seed", "--global-batch", "--seq-len", "--accumulate", "--mesh.data", "--mesh.fsdp"),
    *("--mesh.tensor", "--optim.peak-lr", "--resume", "--run-dir"),
)


@pytest.fixture(scope="module")
def on_eight(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of this process, on eight devices. Not to be changed."""
    run = tmp_path_factory.mktemp("eight") / "run"
    with workshop.cached():
        assert train.main([str(workshop.recipe(run.parent)), "--run-dir", str(run)]) == 0
    return run


def test_a_finished_run_has_everything_that_is_promised(finished: Path):
    names = {path.name for path in finished.iterdir()}
    assert names >= {"run.json", "metrics.jsonl", "checkpoints", "samples.txt", "loss.png", "export"}
    record = json.loads((finished / "run.json").read_text())
    assert record["seed"] == 0
    assert record["versions"].keys() >= {"jax", "flax", "orbax-checkpoint"}
    assert record["run"]["steps"] == 20
    assert record["git_revision"] is None or len(record["git_revision"]) >= 40
    rows = runs.rows(finished)
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert all(row.keys() >= KEYS for row in rows)
    assert [row["tokens"] for row in rows] == [step * 8 * 32 for step in range(1, 21)]
    assert [row["step"] for row in rows if "val_loss" in row] == [10, 20]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    assert rows[-1]["val_bits_per_byte"] > rows[-1]["gzip_bits_per_byte"] > 1
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "samples.txt").read_text().count("--- sample") == 2
    assert {path.name for path in (finished / "export").iterdir()} >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    saved = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert saved == ["15", "15.digests.json", "20", "20.digests.json"]


def test_the_output_says_what_happens_and_where_everything_is(finished: Path):
    lines = finished.with_suffix(".out").read_text().splitlines()
    assert lines[0].split(" parameters")[0].replace(",", "").isdigit()
    assert "1 x cpu as data=1 fsdp=1 tensor=1" in lines[0]
    assert any(line.startswith("step 1/20  loss ") for line in lines)
    assert any(line.startswith("step 20  validation loss") and "gzip -9" in line for line in lines)
    assert any(line.startswith("export: read back from disk") for line in lines)
    for name in ("checkpoints", "metrics.jsonl", "loss.png", "samples.txt", "export"):
        assert any(line.endswith(str(finished / name)) for line in lines), name
    assert any("--steps 40" in line for line in lines)


@pytest.mark.slow
def test_equal_configurations_give_equal_bytes(workshop: Workshop, finished: Path, tmp_path: Path):
    assert workshop.run(workshop.recipe(tmp_path), "--run-dir", tmp_path / "run").code == 0
    assert_same_end(tmp_path / "run", finished)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_one_never_interrupted(workshop: Workshop, tmp_path: Path):
    """GPT-2 with dropout; two kills while training, two while a checkpoint is being written."""
    seed = int.from_bytes(os.urandom(4), "little")
    rng = random.Random(seed)
    flags = ("--steps", 60, "--checkpointing.every", 2, "--eval-every", 25)
    recipe, whole, run = workshop.recipe(tmp_path, "gpt2"), tmp_path / "whole", tmp_path / "killed"
    assert workshop.run(recipe, *flags, "--run-dir", whole).code == 0
    kills = []
    for target, saving in zip(sorted(rng.sample(range(2, 55), 4)), [False, True] * 2, strict=True):
        process = workshop.start(recipe, *flags, "--run-dir", run)
        if wait_for(functools.partial(reached, run, target, saving), process):
            process.kill()
        process.communicate()
        kills.append(process.returncode)
    assert kills.count(-signal.SIGKILL) >= 3, (seed, kills)
    ended = workshop.run(recipe, *flags, "--run-dir", run)
    assert ended.code == 0, (seed, ended)
    assert_same_end(run, whole, 60)


def reached(run: Path, step: int, saving: bool = False) -> bool:
    """Whether the run has got to `step` and, where asked for, is writing a checkpoint right now."""
    if last_step(run) < step or not saving:
        return last_step(run) >= step
    names = {path.name for path in (run / "checkpoints").iterdir()}
    return any(".orbax-checkpoint-tmp" in n or (n.isdigit() and f"{n}.digests.json" not in names) for n in names)


@pytest.mark.slow
def test_sigint_and_sigterm_save_and_say_how_to_go_on(workshop: Workshop, tmp_path: Path):
    recipe, run, whole = workshop.recipe(tmp_path), tmp_path / "run", tmp_path / "whole"
    # No checkpoint but the one that the signal asks for.
    flags = ("--steps", 400, "--checkpointing.every", 1000, "--eval-every", 1000)
    first = ("--resume", "never")
    for number, at in ((signal.SIGINT, 5), (signal.SIGTERM, 30)):
        process = workshop.start(recipe, *flags, *first, "--run-dir", run)
        first = ()
        assert wait_for(functools.partial(reached, run, at), process)
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
        assert (process.returncode, err) == (0, "")
        said = out.splitlines()[-1]
        assert said.startswith("stopped at step")
        assert said.endswith(f"to go on: python -m meshgpt.train {recipe} {' '.join(map(str, flags))} --run-dir {run}")
        stopped = last_step(run)
        assert at <= stopped < 400
        assert (run / "checkpoints" / f"{stopped}.digests.json").exists()
    assert workshop.run(recipe, *flags, "--run-dir", run, "--resume", "must").code == 0
    assert workshop.run(recipe, *flags, "--run-dir", whole).code == 0
    assert_same_end(run, whole, 400)


@pytest.mark.parametrize(("mesh", "accumulate"), [((2, 2, 2), 1), ((1, 8, 1), 1), ((2, 1, 4), 4)], ids=str)
def test_a_run_goes_on_on_another_mesh(
    here: Here, on_eight: Path, tmp_path: Path, mesh: tuple[int, int, int], accumulate: int
):
    run = copied(on_eight, tmp_path / "run")
    drop_checkpoint(run, 20)
    shape = [f"--mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
    flags = (*shape, "--accumulate", accumulate, "--export", "none", "--samples.prompts")
    ended = here.train(here.workshop.recipe(tmp_path), "--run-dir", run, *flags)
    assert ended.code == 0, ended
    assert "resuming from step 15" in ended.out
    assert f"resuming with mesh.data {mesh[0]} (was -1)" in ended.out
    for (step, loss, val), (same, expected, val_expected) in zip(runs.losses(run), runs.losses(on_eight), strict=True):
        assert step == same
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        np.testing.assert_allclose(val or 0.0, val_expected or 0.0, rtol=1e-5)
    ours, theirs = saved_params(run, 20), saved_params(on_eight, 20)
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=1e-4, err_msg=name)


def test_the_eight_devices_and_the_one_learn_the_same(finished: Path, on_eight: Path):
    for (_, loss, _), (_, expected, _) in zip(runs.losses(on_eight), runs.losses(finished), strict=True):
        np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_damaged_checkpoint_is_passed_over_and_the_end_is_the_same(here: Here, on_eight: Path, tmp_path: Path):
    run = copied(on_eight, tmp_path / "run")
    files = [path for path in (run / "checkpoints" / "20").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    contents = bytearray(largest.read_bytes())
    contents[len(contents) // 2] ^= 1
    largest.write_bytes(contents)
    ended = here.train(here.workshop.recipe(tmp_path), "--run-dir", run)
    assert ended.code == 0, ended
    assert "is passed over" in ended.out
    assert largest.name in ended.out
    assert "resuming from step 15" in ended.out
    assert_same_end(run, on_eight)


def test_a_finished_run_says_so(here: Here, on_eight: Path, tmp_path: Path):
    run = copied(on_eight, tmp_path / "run")
    ended = here.train(here.workshop.recipe(tmp_path), "--run-dir", run)
    assert ended.code == 0
    assert "this run is finished: step 20 of 20" in ended.out
    assert "--resume never" in ended.out
    assert (run / "export/model.safetensors").stat().st_mtime == (on_eight / "export/model.safetensors").stat().st_mtime


@pytest.mark.parametrize("missing", ["export", "samples.txt", "the mark"])
def test_a_run_killed_at_its_very_end_is_finished_by_the_next(here: Here, on_eight: Path, tmp_path: Path, missing: str):
    """The mark: longer runs find the export of the shorter run before them, which is not theirs."""
    run = copied(on_eight, tmp_path / "run")
    if missing == "the mark":
        record = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(record | {"finished_step": 10}))
        (run / "export/model.safetensors").write_bytes(b"another run's")
    elif missing == "export":
        shutil.rmtree(run / missing)
    else:
        (run / missing).unlink()
    ended = here.train(here.workshop.recipe(tmp_path), "--run-dir", run)
    assert ended.code == 0, ended
    assert "finished: 20 steps" in ended.out
    assert_same_end(run, on_eight)
    assert RunFolder(run).finished_step() == 20


def test_resume_never_sets_the_earlier_run_aside(here: Here, on_eight: Path, tmp_path: Path):
    run = copied(on_eight, tmp_path / "run")
    ended = here.train(here.workshop.recipe(tmp_path), "--run-dir", run, "--resume", "never", "--seed", 3)
    assert ended.code == 0, ended
    aside = tmp_path / "run.previous-1"
    assert f"the earlier run is now in {aside}" in ended.out
    assert_same_end(aside, on_eight)
    assert runs.losses(run)[0] != runs.losses(on_eight)[0]


def test_resume_must_needs_a_run(here: Here, tmp_path: Path):
    recipe = here.workshop.recipe(tmp_path)
    here.train(recipe, "--run-dir", tmp_path / "run", "--resume", "must").refused("--resume must", "no run to go on")


CHANGES = {
    "seed": ("--seed", 3),
    "global_batch": ("--global-batch", 16),
    "seq_len": ("--seq-len", 16),
    "optim.peak_lr": ("--optim.peak-lr", 1.0),
    "model.d_model": ("--model.d-model", 64),
    "precision.params": ("--precision.params", "bfloat16"),
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_change_that_cannot_resume_is_refused_by_name(here: Here, on_eight: Path, tmp_path: Path, field: str):
    run = copied(on_eight, tmp_path / "run")
    before = (run / "run.json").read_bytes()
    ended = here.train(here.workshop.recipe(tmp_path), "--run-dir", run, *CHANGES[field])
    ended.refused(f"{field} was ", f"now {CHANGES[field][1]!r}", "--resume never", "--run-dir")
    assert (run / "run.json").read_bytes() == before


def test_fewer_steps_than_done_are_refused(here: Here, on_eight: Path, tmp_path: Path):
    run = copied(on_eight, tmp_path / "run")
    here.train(here.workshop.recipe(tmp_path), "--run-dir", run, "--steps", 10).refused("step 20", "--steps 10")


def test_other_tokens_are_refused_and_a_store_may_move(here: Here, on_eight: Path, tmp_path: Path):
    workshop, run = here.workshop, copied(on_eight, tmp_path / "run")
    moved = Path(shutil.copytree(workshop.store, tmp_path / "moved"))
    drop_checkpoint(run, 20)
    ended = here.train(workshop.recipe(tmp_path, store=moved), "--run-dir", run)
    assert ended.code == 0, ended
    assert_same_end(run, on_eight)
    other = tmp_path / "other"
    make_store(other, workshop.texts / "ast.txt", tokenizer=str(workshop.store / "tokenizer"), val_fraction=0.0)
    ended = here.train(workshop.recipe(tmp_path, store=other), "--run-dir", run, "--steps", 30)
    ended.refused("step 20", str(other), "give the store it was trained on", "--resume never")
    assert RunFolder(run).read_run().data.store == str(moved), "a refusal leaves the record as it was"


def test_nothing_is_locked_before_the_first_checkpoint(here: Here, tmp_path: Path):
    """What the remedies of the first mistakes ask for must be possible in the same folder."""
    recipe, run = here.workshop.recipe(tmp_path), tmp_path / "run"
    here.train(recipe, "--run-dir", run, "--model.vocab-size", 300).refused("320", "300", "--model.vocab-size 320")
    assert here.train(recipe, "--run-dir", run).code == 0


def test_two_trainers_on_one_folder_are_refused(here: Here, on_eight: Path, tmp_path: Path):
    run = copied(on_eight, tmp_path / "run")
    with RunFolder(run).claimed(RunFolder(run).read_run(), "the first", lambda line: None):
        ended = here.train(here.workshop.recipe(tmp_path), "--run-dir", run)
    ended.refused("another process", str(run))
    assert here.train(here.workshop.recipe(tmp_path), "--run-dir", run).code == 0


def test_steps_that_are_not_finite_stop_the_run_and_leave_the_last_good_parameters(here: Here, tmp_path: Path):
    run = tmp_path / "run"
    ended = here.train(
        here.workshop.recipe(tmp_path), "--run-dir", run, "--optim.peak-lr", 1e30, "--optim.warmup-steps", 0,
        "--max-bad-steps", 4, "--checkpointing.every", 1, "--checkpointing.keep", 50,
    )  # fmt: skip
    ended.refused("4 steps in a row", "not finite", "--optim.peak-lr", str(run / "checkpoints"))
    rows = runs.rows(run)
    bad = [row["step"] for row in rows if row["loss"] is None or row["grad_norm"] is None]
    assert len(bad) >= 4
    good = min(bad) - 1
    assert good >= 1
    assert rows[-1]["skipped_steps"] == rows[-1]["step"] - good
    last = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    assert last >= max(bad)
    kept, final = saved_params(run, good), saved_params(run, last)
    for name, value in final.items():
        assert np.isfinite(value).all()
        assert value.tobytes() == kept[name].tobytes(), name


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, dict, list[str]]]:
    """A folder on a full disk, what a process needs to feel it, and the command that gives it room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.getuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        yield folder, {}, ["mount", "-o", "remount,size=256m", str(folder)]
        subprocess.run(["umount", str(folder)], check=True)
    else:
        limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))}
        yield folder, limit, ["true"]


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_loses_nothing(
    workshop: Workshop, finished: Path, small_disk: tuple[Path, dict, list[str]], tmp_path: Path
):
    folder, limit, give_room = small_disk
    recipe, run = workshop.recipe(tmp_path), folder / "run"
    flags = ("--run-dir", run, "--checkpointing.keep", 20)
    workshop.run(recipe, *flags, **limit).refused(str(folder), "full", "Free space", "resume")
    subprocess.run(give_room, check=True)
    assert workshop.run(recipe, *flags).code == 0
    assert_same_end(run, finished)


def test_preparing_belongs_to_the_run(here: Here, tmp_path: Path):
    """A recipe that says what to prepare; its errors name the flags as they are called here."""
    recipe, run = tmp_path / "with_text.py", tmp_path / "run"
    text = here.workshop.recipe(tmp_path).read_text()
    sources, trained = f"sources=({str(here.workshop.texts)!r},)", "train_tokenizer='bpe', vocab_size=320"
    wanted = f"Prepare({sources}, out='', {trained}, val_fraction=0.2, workers=1)"
    text = text.replace("store=" + repr(str(here.workshop.store)), f"prepare={wanted}")
    recipe.write_text("from meshgpt.data.prepare import Prepare\n" + text)
    few = ("--run-dir", run, "--export", "none", "--samples.prompts")
    assert here.train(recipe, *few).code == 0
    assert (run / "data" / "index.json").exists()
    ended = here.train(recipe, *few, "--resume", "never", "--data.prepare.val-fraction", 0.3)
    ended.refused("val_fraction was 0.2, now 0.3", "--data.prepare.overwrite")
    assert here.train(recipe, *few, "--resume", "auto").code == 0


def test_text_without_a_held_out_part_trains_and_exports(here: Here, tmp_path: Path):
    tokenizer = str(here.workshop.store / "tokenizer")
    store = make_store(tmp_path / "store", here.workshop.texts / "ast.txt", tokenizer=tokenizer, val_fraction=0.0)
    ended = here.train(here.workshop.recipe(tmp_path, store=store), "--run-dir", tmp_path / "run")
    assert ended.code == 0, ended
    assert (tmp_path / "run/export/model.safetensors").exists()
    assert not any("val_loss" in row for row in runs.rows(tmp_path / "run"))


def test_the_common_flags_are_there(here: Here, tmp_path: Path):
    ended = here.train(here.workshop.recipe(tmp_path), "--help")
    assert ended.code == 0
    for flag in FLAGS:
        assert f"{flag} " in ended.out
    assert "{auto,never,must}" in ended.out


def mistakes(workshop: Workshop, folder: Path) -> dict[str, tuple[list[object], list[str]]]:
    """Arguments after the recipe, and words of the answer."""
    foreign = folder / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    stale = Path(shutil.copytree(workshop.store, folder / "stale"))
    tokenizer = stale / "tokenizer" / "tokenizer.json"
    document = json.loads(tokenizer.read_text())
    document["model"]["merges"] = document["model"]["merges"][:-1]
    tokenizer.write_text(json.dumps(document))
    short = folder / "short"
    (folder / "short.txt").write_text("a few words")
    make_store(short, folder / "short.txt", tokenizer=str(workshop.store / "tokenizer"), val_fraction=0.0)
    return {
        "no store": (["--data.store", folder / "nowhere"], [str(folder / "nowhere"), "meshgpt prepare"]),
        "short text": (["--data.store", short], ["train split", "seq_len 32", "--seq-len"]),
        "another tokenizer": (["--data.store", stale], ["tokenizer", "is not the one", "prepare the text again"]),
        "small vocabulary": (["--model.vocab-size", 100], ["320", "100", "--model.vocab-size 320"]),
        "long sequences": (["--seq-len", 33], ["33", "32", "--model.n-positions"]),
        "a folder of another kind": (["--run-dir", foreign], [str(foreign), "thesis.tex", "--run-dir"]),
        "a file as the folder": (["--run-dir", tokenizer], [str(tokenizer), "--run-dir"]),
        "unknown flag": (["--stepz", 3], ["--stepz", "Perhaps you meant", "--steps"]),
        "unknown nested flag": (["--optim.peak-lrr", 3], ["Perhaps you meant", "--optim.peak-lr"]),
        "wrong type": (["--steps", "many"], ["--steps", "many"]),
        "wrong choice": (["--resume", "perhaps"], ["--resume", "perhaps", "never"]),
        "no steps": (["--steps", 0], ["--steps 0", "at least 1"]),
        "no seed": (["--seed", -1], ["--seed -1"]),
        "uneven accumulation": (["--accumulate", 3], ["--global-batch 8", "--accumulate 3", "--global-batch 9"]),
        "a batch that the mesh does not divide": (["--global-batch", 12], ["12", "8"]),
        "heads that the mesh does not divide": (["--mesh.data", 1, "--mesh.tensor", 8], ["4", "8"]),
        "a mesh of too many devices": (["--mesh.data", 16], ["data=16", "8"]),
        "an extension backwards": (["--extend", -1], ["--extend -1", "cannot be negative"]),
        "a long prompt": (["--samples.prompts", "x " * 99], ["--samples.prompts", "context is 32"]),
        "a bad temperature": (["--samples.temperature", -1], ["temperature", "-1"]),
    }


def test_every_mistake_ends_in_one_message(here: Here, tmp_path: Path):
    recipe = here.workshop.recipe(tmp_path)
    for name, (arguments, words) in mistakes(here.workshop, tmp_path).items():
        run = tmp_path / "run" / name.replace(" ", "-")
        ended = here.train(recipe, "--run-dir", run, *arguments)
        ended.refused(*words)
        assert not (run / "metrics.jsonl").exists(), name


def test_a_recipe_is_needed(here: Here, tmp_path: Path):
    here.train().refused("which recipe?", "configs/quickstart.py")
    here.train(tmp_path / "none.py").refused("none.py", "configs/quickstart.py")
    assert here.train("--help").code == 0


def test_the_record_can_be_read_back(on_eight: Path):
    run = RunFolder(on_eight).read_run()
    assert isinstance(run, Run)
    assert to_json(run) == json.loads((on_eight / "run.json").read_text())["run"]
    assert jax.device_count() == 8
