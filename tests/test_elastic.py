"""The same tokens in the same order, whatever reads them: processes, mesh, accumulation; mixtures, packing, masks."""

from pathlib import Path

import pods
import pytest
import runs
from runs import FILES, Here, Workshop

from meshgpt.data.packing import pack
from meshgpt.data.store import Store

RECIPE = """
from meshgpt.checkpoint import Checkpointing
from meshgpt.config import Data, Run, Samples
from meshgpt.data.mixture import Source, Stage
from meshgpt.models import GPTJConfig
from meshgpt.optim import AdamW, Constant

def config():
    one, two = {one!r}, {two!r}
    first = Stage(sources=(Source(store=one, weight=2), Source(store=two)), until_step=3)
    then = Stage(sources=(Source(store=one), Source(store=two, weight=3)))
    return Run(
        model=GPTJConfig(vocab_size=320, n_positions=32, n_layers=1, n_heads=2, d_model=32, rotary_dim=4),
        data=Data(mixture=(first, then), packing="best_fit", mask_documents=True),
        steps=6, global_batch=16, log_every=1, eval_every=100,
        optim=AdamW(peak_lr=3e-3, warmup_steps=0, schedule=Constant()),
        checkpointing=Checkpointing(every=3), samples=Samples(prompts=()), export="none",
    )
"""


@pytest.mark.slow
def test_four_processes_go_on_as_two_on_another_mesh_with_another_accumulation(
    workshop: Workshop, here: Here, tmp_path: Path
):
    stores = []
    for name, files in (("one", FILES[:5]), ("two", FILES[5:])):
        lines = [line for file in files for line in (workshop.texts / f"{file}.txt").read_text().split("\n\n")]
        texts = tmp_path / f"{name}-texts"
        texts.mkdir()
        for number, line in enumerate(lines[:300]):
            (texts / f"{number:03d}.txt").write_text(line)
        store = runs.make_store(tmp_path / name, texts, tokenizer=str(workshop.store / "tokenizer"), val_fraction=0.1)
        pack(Store.open(store), 32)
        stores.append(str(store))
    recipe = tmp_path / "mixed.py"
    recipe.write_text(RECIPE.format(one=stores[0], two=stores[1]))

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert here.train(recipe, "--run-dir", whole, "--mesh.data", 8).code == 0
    first = pods.ended(
        pods.start(workshop, 4, 2, recipe, "--run-dir", cut, "--steps", 3, "--accumulate", 2, "--mesh.data", 8)
    )
    assert [process.code for process in first] == [0] * 4, first
    then = pods.ended(pods.start(workshop, 2, 4, recipe, "--run-dir", cut, "--mesh.data", 2, "--mesh.fsdp", 4))
    assert [process.code for process in then] == [0] * 2, then
    assert "resuming from step 3" in then[0].out

    ours, theirs = runs.losses(cut), runs.losses(whole)
    assert [row[0] for row in ours] == list(range(1, 7))
    assert [row[1] for row in ours] == pytest.approx([row[1] for row in theirs], rel=2e-5)
    orders = [here.cli("data", "order", run, "--from-step", 1, "--to-step", 6) for run in (whole, cut)]
    assert [order.code for order in orders] == [0, 0], orders
    lines = orders[0].out.splitlines()
    assert len({line.split()[-1] for line in lines if line.split()[-1:]}) >= 6  # six digests, all different
    assert orders[0].out.replace(str(whole), "RUN") == orders[1].out.replace(str(cut), "RUN")
