"""`import meshgpt`: what it offers, what it costs, and that it agrees with the commands and with transformers."""

import ast
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from runs import ROOT, Here, copied

import meshgpt as mg
from meshgpt.config import from_json


@pytest.fixture(scope="module")
def lm(finished_gpt2: Path) -> mg.LanguageModel:
    return mg.load(finished_gpt2)


def test_every_name_is_there_and_importing_takes_no_jax() -> None:
    assert set(mg.__all__) <= set(dir(mg))
    stub = ast.parse((ROOT / "meshgpt/__init__.pyi").read_text())
    typed = {alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == set(mg.__all__)
    assert all(getattr(mg, name) is not None for name in mg.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        mg.trian  # noqa: B018
    program = "import sys, meshgpt; assert not {'jax', 'numpy', 'optax'} & set(sys.modules), 'slow'; meshgpt.UserError"
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
    assert time.monotonic() - begun < 120  # that it does not hang


def test_a_run_from_python_is_the_command_s(
    here: Here, finished_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    heard: list[tuple[str, int]] = []
    losses: dict[int, float] = {}

    class Listener(mg.Callback):
        def on_step(self, step, metrics):
            heard.append(("step", step))
            losses[step] = metrics["loss"]

        def on_eval(self, step, metrics):
            assert metrics["val_loss"] > 0
            heard.append(("eval", step))

        def on_checkpoint(self, step, folder):
            assert folder == tmp_path / "run/checkpoints" / str(step)
            heard.append(("checkpoint", step))

    recorded = json.loads((finished_gpt2 / "run.json").read_text())["run"]
    run = from_json(mg.Run, recorded | {"run_dir": str(tmp_path / "run"), "export": "none", "steps": 20})
    with here.workshop.cached():
        trained = mg.train(run, callbacks=[Listener()])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # and nothing where Python was started
    assert [step for kind, step in heard if kind == "step"] == list(range(1, 21))
    assert [step for kind, step in heard if kind == "eval"] == [10, 20]
    assert [step for kind, step in heard if kind == "checkpoint"] == [5, 10, 15, 20]
    assert trained.metrics == runs.rows(tmp_path / "run")
    assert losses == {row["step"]: row["loss"] for row in trained.metrics if "loss" in row}
    tolerance = {"rel": 2e-3}  # another number of devices than the command's
    command = [row["loss"] for row in runs.rows(finished_gpt2)]
    assert [row["loss"] for row in trained.metrics] == pytest.approx(command, **tolerance)
    png = trained._repr_png_()
    assert png is not None
    assert png.startswith(b"\x89PNG")
    assert "val_loss=" in repr(trained)


def test_a_callback_that_raises_ends_the_run(here: Here, finished_gpt2: Path, tmp_path: Path) -> None:
    class Broken(mg.Callback):
        def on_step(self, step, metrics):
            raise RuntimeError("mine")

    recorded = json.loads((finished_gpt2 / "run.json").read_text())["run"]
    run = from_json(mg.Run, recorded | {"run_dir": str(tmp_path / "run")})
    with here.workshop.cached(), pytest.raises(RuntimeError, match="mine"):
        mg.train(run, callbacks=[Broken()])


def test_it_writes_what_the_command_writes(here: Here, finished_gpt2: Path, lm: mg.LanguageModel) -> None:
    said = here.cli("generate", finished_gpt2, "--prompt", "def ", "import ", "--max-new-tokens", 9, "--seed", 3).out
    for prompt, text in zip(["def ", "import "], lm.generate(["def ", "import "], 9, seed=3), strict=True):
        assert f"{prompt}{text}\n" in said
    assert lm.generate("def ", 9, seed=3) == lm.generate(["def "], max_new_tokens=9, seed=3)
    assert len(lm.generate(["a", "b"], 4, samples=3)) == 6
    with pytest.raises(mg.UserError, match="temperature"):
        lm.generate("a", temperature=-1.0)


def test_logits_and_likelihoods_are_those_of_transformers(lm: mg.LanguageModel, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    verdict = lm.export(tmp_path / "model")
    assert "equal" in str(verdict)
    with pytest.raises(mg.UserError, match="model"):
        lm.export(tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "model")).eval()
    tokens = np.random.default_rng(0).integers(0, lm.config.vocab_size, (3, 11))
    with torch.no_grad():
        expected = theirs(torch.as_tensor(tokens)).logits.numpy()
    ours = lm.logits(tokens)
    assert ours.shape == (3, 11, lm.config.vocab_size)
    np.testing.assert_allclose(ours, expected, atol=2e-4)

    text = "def encode(self, value):\n    return value\n"
    ids = [lm.tokenizer.eot_id, *lm.tokenizer.encode(text)]
    with torch.no_grad():
        logp = torch.log_softmax(theirs(torch.as_tensor([ids[:-1]])).logits[0].double(), -1).numpy()
    nats = -logp[np.arange(len(ids) - 1), ids[1:]].sum()
    (score,) = lm.log_likelihood([("", text)])
    assert score.log_likelihood == pytest.approx(-nats, rel=1e-4)
    measured = lm.perplexity(text)
    assert measured.token_perplexity == pytest.approx(np.exp(nats / (len(ids) - 1)), rel=1e-4)
    assert float(measured) == measured.token_perplexity
    again = mg.load(tmp_path / "model", mesh=mg.MeshShape(tensor=2))
    assert again.mesh.shape["tensor"] == 2
    np.testing.assert_allclose(again.logits(tokens), ours, atol=2e-4)
    assert jax.tree.structure(again.params) == jax.tree.structure(lm.params)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2, 3], r"shape \(3,\)"),
        ([[]], r"shape \(1, 0\)"),
        ([[0.5]], "dtype float64"),
        ([[-1]], "ids outside of 0 to"),
        ([[10**6]], "ids outside of 0 to"),
        ([[0] * 33], "33 tokens are more than the model's 32 positions"),
    ],
)
def test_tokens_that_cannot_be(lm: mg.LanguageModel, tokens, message: str) -> None:
    with pytest.raises(mg.UserError, match=message):
        lm.logits(tokens)


def test_a_place_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(mg.UserError, match=r"has none of run.json, .* give a run's folder"):
        mg.load(tmp_path)
    with pytest.raises(mg.UserError, match=r"Run\.run_dir is empty"):
        mg.train(mg.Run(model=mg.GPT2Config(), data=mg.Data(store="x"), steps=1, global_batch=1))


def test_a_checkpoint_can_be_chosen(finished_gpt2: Path, tmp_path: Path) -> None:
    run = copied(finished_gpt2, tmp_path / "run")
    early, late = mg.load(run, step=15), mg.load(run)
    assert not np.array_equal(early.logits([[1, 2]]), late.logits([[1, 2]]))


def test_the_notebook_runs_from_the_first_cell_to_the_last(here: Here, tmp_path: Path) -> None:
    notebook = json.loads((ROOT / "docs/notebook.ipynb").read_text())
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    # As a notebook does, each cell by itself in one namespace; the last expression is shown.
    program = "import json, sys\nscope = {}\nfor cell in json.loads(sys.argv[1]):\n    exec(cell, scope)\n"
    program += "print(scope['lm'].logits([scope['tokens']]).shape, scope['loudest'].largest > 0)\n"
    environment = here.workshop.environment()
    ran = subprocess.run(
        [sys.executable, "-c", program, json.dumps(cells)], cwd=tmp_path, env=environment, capture_output=True,
        text=True, timeout=600, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.rstrip().endswith("512) True")
    assert (tmp_path / "notebook-run/model/model.safetensors").is_file()
