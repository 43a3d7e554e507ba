"""Runs that distil, whole: the student's start, the teacher beside it in 16 and in 4 bits, resuming, and refusals."""

import asyncio
import importlib.util
import json
from pathlib import Path

import hf_peers
import jax
import numpy as np
import pytest
import runs

import meshgpt
from meshgpt.data.tokenizer import load_tokenizer, train_bpe
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.gptj import GPTJConfig

RECIPE = """from meshgpt.checkpoint.manager import Checkpointing
from meshgpt.config import Data, Run, Samples
from meshgpt.objectives.distillation import Distill
from meshgpt.models import GPT2Config
from meshgpt.optim import AdamW


def config():
    return Run(
        model=GPT2Config(vocab_size={vocab}, n_positions=32, n_layers=2, n_heads=4, d_model=64),
        data=Data(store={store!r}),
        objective=Distill(teacher={teacher!r}),
        steps=4,
        global_batch=8,
        optim=AdamW(peak_lr=1e-3, warmup_steps=2),
        eval_every=2,
        eval_batches=2,
        log_every=1,
        checkpointing=Checkpointing(every=2),
        samples=Samples(prompts=()),
        export="none",
    )
"""
TEACHER = GPT2Config(vocab_size=runs.VOCAB, n_positions=32, n_layers=4, n_heads=4, d_model=64)


@pytest.fixture(scope="module")
def teacher(workshop: runs.Workshop) -> Path:
    return folder_of(workshop, TEACHER, "teacher")


def folder_of(workshop: runs.Workshop, config: GPT2Config | GPTJConfig, name: str) -> Path:
    """Random weights with the store's tokenizer, in transformers' form."""
    folder = workshop.folder / name
    hf_peers.peer(config).save_pretrained(folder)
    load_tokenizer(workshop.store / "tokenizer").save(folder)
    return folder


def recipe(workshop: runs.Workshop, to: Path, teacher: Path) -> Path:
    path = to / "distil.py"
    path.write_text(RECIPE.format(vocab=runs.VOCAB, store=str(workshop.store), teacher=str(teacher)))
    return path


def test_a_run_from_start_to_card(here: runs.Here, workshop: runs.Workshop, teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    mesh = ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2")
    questions = tmp_path / "choices.jsonl"
    rows = [{"ctx": f"def f{n}(self):", "endings": [" return self", " import the"], "label": n % 2} for n in range(6)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--run-dir", run, *mesh, "--evals.choices", questions)
    ended = here.train(recipe(workshop, tmp_path, teacher), *flags)
    assert ended.code == 0, ended
    assert "the student starts from layers 0, 2 of the teacher" in ended.out
    record = json.loads((run / "run.json").read_text())
    assert record["run"]["objective"]["teacher_model"]["n_layers"] == 4
    before = json.loads((run / "distillation.json").read_text())
    assert before["teacher_val_loss"] > 0
    assert before["student_start_val_loss"] > 0
    # Accuracy of the same questions: of random weights some number, of a student that is its teacher's part another.
    for found in (before["teacher_evals"], before["student_start_evals"]):
        assert 0.0 <= found["eval/choices/acc"] <= 1.0
    # What validation and `loss` report is the text alone: the objective is several times as large.
    last = runs.rows(run)[-1]
    assert last["val_loss"] < before["student_start_val_loss"]
    assert last["objective"] > last["val_loss"] * 1.5
    assert last["loss"] == pytest.approx(last["val_loss"], rel=0.1)
    assert here.cli("report", run).code == 0
    card = next(run.rglob("README.md")).read_text()
    for words in ("Distillation: before and after", "student before the first step", "student after 4 steps"):
        assert words in card
    assert "choices/acc" in card


def test_the_student_starts_as_layers_of_the_teacher(
    here: runs.Here, workshop: runs.Workshop, teacher: Path, tmp_path: Path
) -> None:
    """With a learning rate of nothing the first checkpoint is what the run started from."""
    still = ("--optim.peak-lr", "1e-30", "--optim.weight-decay", "0", "--steps", "1", "--optim.warmup-steps", "0")
    ended = here.train(
        recipe(workshop, tmp_path, teacher), "--run-dir", tmp_path / "run", *still, "--objective.layers", "3", "1"
    )
    assert ended.code == 0, ended
    params = runs.saved_params(tmp_path / "run", 1)
    weights = {name: value.detach().numpy() for name, value in hf_peers.peer(TEACHER).state_dict().items()}
    for layer, of_teacher in enumerate((3, 1)):
        up = weights[f"transformer.h.{of_teacher}.mlp.c_fc.weight"]
        np.testing.assert_allclose(params["blocks/mlp/up_DF"][layer], up, rtol=1e-6)
    np.testing.assert_allclose(params["wte_VD"][: runs.VOCAB], weights["transformer.wte.weight"], rtol=1e-6)
    np.testing.assert_allclose(params["wpe_SD"], weights["transformer.wpe.weight"], rtol=1e-6)
    np.testing.assert_allclose(params["ln_f/scale_D"], weights["transformer.ln_f.weight"], rtol=1e-6)


def test_a_resumed_run_is_the_uninterrupted_one(
    here: runs.Here, workshop: runs.Workshop, teacher: Path, tmp_path: Path
) -> None:
    source = recipe(workshop, tmp_path, teacher)
    assert here.train(source, "--run-dir", tmp_path / "whole").code == 0
    run = runs.copied(tmp_path / "whole", tmp_path / "cut")
    runs.drop_checkpoint(run, 4)
    assert here.train(source, "--run-dir", run).code == 0
    ours, theirs = runs.saved_params(run, 4), runs.saved_params(tmp_path / "whole", 4)
    assert all(value.tobytes() == theirs[name].tobytes() for name, value in ours.items())


def test_a_teacher_of_4_bits(here: runs.Here, workshop: runs.Workshop, teacher: Path, tmp_path: Path) -> None:
    """The same run, but for what rounding the teacher costs."""
    low = tmp_path / "teacher-nf4"
    assert here.cli("quantize", teacher, "--format", "nf4", "--out", low).code == 0
    found = {}
    for name, source in (("plain", teacher), ("low", low)):
        mesh = ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2")
        ended = here.train(recipe(workshop, tmp_path, source), "--run-dir", tmp_path / name, *mesh)
        assert ended.code == 0, ended
        found[name] = [row["loss"] for row in runs.rows(tmp_path / name)]
    np.testing.assert_allclose(found["low"], found["plain"], rtol=0.1)
    assert found["low"] != found["plain"]


def test_a_teacher_of_the_other_family(here: runs.Here, workshop: runs.Workshop, tmp_path: Path) -> None:
    other = GPTJConfig(vocab_size=runs.VOCAB + 7, n_positions=32, n_layers=1, n_heads=2, d_model=32, rotary_dim=8)
    folder = folder_of(workshop, other, "other")
    source = recipe(workshop, tmp_path, folder)
    cosine = here.train(source, "--run-dir", tmp_path / "a")
    cosine.refused("hidden states have 32 numbers and the student's 64", "--objective.alpha-cos 0")
    flags = ("--objective.alpha-cos", "0", "--objective.layers", "0", "0")
    here.train(source, "--run-dir", tmp_path / "b", *flags).refused("same family and width", "--objective.start fresh")
    flags = ("--objective.alpha-cos", "0", "--objective.start", "fresh")
    assert (
        here.train(source, "--run-dir", tmp_path / "c", *flags, "--steps", "2", "--optim.warmup-steps", "1").code == 0
    )


@pytest.mark.slow
def test_a_taught_student_is_better_than_one_that_hears_the_text_alone(
    workshop: runs.Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same student, start, steps and data, on real text: benchmarks/distillation.py, smaller."""
    path = runs.ROOT / "benchmarks" / "distillation.py"
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location("distillation_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    monkeypatch.setattr(benchmark, "VOCAB", 512)
    monkeypatch.setattr(benchmark, "DEPTH", 4)
    text = tmp_path / "text.jsonl"
    sources = sorted(Path(asyncio.__file__).parents[1].glob("[a-h]*.py"))
    text.write_text("".join(json.dumps({"text": source.read_text()}) + "\n" for source in sources))
    with workshop.cached():
        _, students = benchmark.compare(tmp_path, str(text), 200, 20, seeds=1)
    taught, alone = (benchmark.losses(students[kind, 0])[1][-1] for kind in (True, False))
    assert taught < alone - 0.005, (taught, alone)  # 0.024 when this was written


def test_refusals(here: runs.Here, workshop: runs.Workshop, teacher: Path, tmp_path: Path) -> None:
    run = ("--run-dir", tmp_path / "run")
    source = recipe(workshop, tmp_path, teacher)
    here.train(source, *run, "--objective.layers", "0", "4").refused("the teacher has layers 0 to 3")
    here.train(source, *run, "--objective.teacher", tmp_path / "none").refused("none")
    stranger = folder_of(workshop, TEACHER, "stranger")
    text = "the teacher read quite another text, of which it made its own tokens " * 20
    train_bpe([text], 300).save(stranger)
    here.train(source, *run, "--objective.teacher", stranger).refused("gives other ids", "--tokenizer")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_the_published_recipe_is_traced_without_weights(tmp_path: Path) -> None:
    from meshgpt.distributed.mesh import MeshShape, make_mesh
    from meshgpt.recipe import load
    from meshgpt.training.program import Program

    run = load(Path(meshgpt.__file__).parent.parent / "configs" / "distilgpt2.py")
    with jax.set_mesh(make_mesh(MeshShape(data=8))):
        program = Program(run=run)
        lowered = program.lower()
        assert "teacher" in program.abstract_frozen()
    assert lowered.as_text()
