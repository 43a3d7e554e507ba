"""What a run takes of a device's memory: the compiler's account, the refusal to start, and the changes offered."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from meshgpt import cli
from meshgpt.config import Data, Run
from meshgpt.distributed.mesh import MeshShape, make_mesh
from meshgpt.errors import UserError
from meshgpt.models.layers import Execution
from meshgpt.models.model import GPT2Config
from meshgpt.optim.config import AdamW, AdamW4bit, AdamW8bit
from meshgpt.planning import memory
from meshgpt.training import memory as footprint
from meshgpt.training.program import Program

RECIPE = """
from meshgpt.config import Data, Run
from meshgpt.models import GPT2Config
from meshgpt.optim import AdamW
def config():
    model = GPT2Config(vocab_size=500, n_layers=4, d_model=128, n_heads=2, n_positions=256)
    return Run(model=model, data=Data(), steps=10, global_batch=64, optim=AdamW(warmup_steps=2))
"""


def small(**changes) -> Run:
    model = GPT2Config(vocab_size=500, n_layers=2, d_model=128, n_heads=2, n_positions=64)
    run = Run(model=model, data=Data(), steps=10, global_batch=16, optim=AdamW(warmup_steps=2))
    return dataclasses.replace(run, **changes)


def account(run: Run) -> footprint.Footprint:
    with jax.set_mesh(make_mesh(run.mesh)):
        program = Program(run=run)
        return footprint.measure(program, program.lower().compile(), None)


def test_the_account_is_that_of_the_shapes_and_of_the_shards():
    whole, cut = account(small(mesh=MeshShape(data=8))), account(small(mesh=MeshShape(data=1, fsdp=8)))
    parameters = 4 * (512 * 128 + 64 * 128 + 2 * (12 * 128 * 128 + 13 * 128) + 2 * 128)  # 4 D^2 + 8 D^2, biases, norms
    assert whole.parameters == whole.gradients == parameters
    assert whole.optimizer == pytest.approx(2 * parameters, abs=16)
    assert cut.parameters < 0.25 * parameters  # all but norms and biases in eighths
    assert whole.peak >= whole.arguments + whole.gradients
    sixteenth = account(small(mesh=MeshShape(data=8), optim=AdamW8bit(warmup_steps=2)))
    assert sixteenth.optimizer < 0.3 * whole.optimizer


def test_a_peak_grows_with_the_microbatch():
    one, four = (account(small(mesh=MeshShape(data=8), global_batch=64, accumulate=n)) for n in (8, 2))
    assert four.activations > 1.5 * one.activations


def test_the_verb_offers_what_was_compiled_and_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = tmp_path / "small.py"
    recipe.write_text(RECIPE)
    flags = ["plan", "memory", str(recipe), "--mesh.data", "8"]
    assert cli.main([*flags, "--device-memory", "1GiB"]) == 0
    assert "it fits: " in capsys.readouterr().out
    assert cli.main([*flags, "--device-memory", "60MiB", "--json", "--tries", "3"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert not said["fits"]
    assert said["peak"] == said["memory"]["peak"] > 0.95 * 60 * 2**20
    assert said["changes"][0]["change"].startswith("--accumulate")
    for change in said["changes"]:
        assert change["fits"] == (change["peak"] <= 0.95 * 60 * 2**20)
        assert change["peak"] < said["peak"]
    for flag, words in (("12", "give a size such as 12GiB"), ("..GiB", "give a size")):
        assert cli.main([*flags, "--device-memory", flag]) == 2
        assert words in capsys.readouterr().err


def test_changes_are_those_that_the_run_does_not_have_yet():
    names = [change.how for change in memory.changes(small())]
    assert names[0] == "--accumulate 4"
    assert "optim=AdamW4bit(...)" in names
    done = small(accumulate=16, optim=AdamW4bit(warmup_steps=2), execution=Execution(remat="full"))
    assert [change.how for change in memory.changes(done)] == []
    for change in memory.changes(small(optim=AdamW(warmup_steps=2, peak_lr=3e-3, b1=0.8))):
        if "8bit" in change.how:
            assert change.run.optim == AdamW8bit(warmup_steps=2, peak_lr=3e-3, b1=0.8)


def test_changes_are_combined_past_those_that_cannot_be_done():
    def compiled(run: Run) -> footprint.Footprint:
        if run.accumulate > 1:  # as where the rows have to be divided among devices
            raise UserError("no such mesh")
        peak = 100 - 40 * (run.execution.remat == "named") - 40 * isinstance(run.optim, AdamW8bit)
        return footprint.Footprint(
            parameters=1, frozen=0, gradients=1, optimizer=1, arguments=1, peak=peak, limit=30
        )  # fmt: skip

    said: list[str] = []
    tried = list(memory.search(small(), memory.Target(name="x", limit=30, compile=compiled), 8, said.append))
    assert (tried[-1].change.how, tried[-1].fits) == ("--execution.remat named, optim=AdamW8bit(...)", True)
    assert "cannot be done here: --accumulate 4" in said[0]


@pytest.mark.parametrize(("text", "size"), [("12GiB", 12 * 2**30), ("80GB", 80 * 10**9), ("1.5 mib", 3 * 2**19)])
def test_sizes(text: str, size: int):
    assert memory.size(text) == size


def test_too_large_for_the_device_is_said_before_the_first_step(monkeypatch: pytest.MonkeyPatch):
    with jax.set_mesh(make_mesh(MeshShape(data=8))):
        program = Program(run=small(mesh=MeshShape(data=8)))
        compiled = program.lower().compile()
        monkeypatch.setattr(footprint, "device_limit", lambda device: 1 << 20)
        with pytest.raises(UserError, match=r"does not fit(.|\n)*activations and the rest(.|\n)*meshgpt plan memory"):
            footprint.check_fits(program, compiled)
        monkeypatch.setattr(footprint, "device_limit", lambda device: None)
        footprint.check_fits(program, compiled)
