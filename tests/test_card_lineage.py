"""The card says what was done and nothing else: each kind of run has its own words."""

import dataclasses
import json
from pathlib import Path

import fake_run
import pytest
import yaml

from meshgpt.config import Evals, Run
from meshgpt.models.trainable import LastLayers, LoRA
from meshgpt.objectives.distillation import Distill
from meshgpt.objectives.loss import NextToken
from meshgpt.report.blocks import to_markdown
from meshgpt.report.card import CardOptions, card
from meshgpt.report.facts import read_facts
from meshgpt.report.front_matter import front_matter
from meshgpt.training.run_folder import RunFolder

BASE = "someone/gpt2-small"
TEACHER = "runs/large"
AIM = "to maximise the likelihood of the next token"
WIDE = dataclasses.replace(fake_run.TINY, n_layers=4)
KINDS = {
    "scratch": {},
    "z_loss": {"objective": NextToken(z_loss=1e-4)},
    "init": {"init": BASE},
    "revision": {"init": f"{BASE}@v2"},
    "lora": {"init": BASE, "trainable": LoRA(rank=4, alpha=8.0)},
    "last": {"init": BASE, "trainable": LastLayers(layers=1)},
    "distilled": {"objective": Distill(teacher=TEACHER, teacher_model=WIDE)},
    "distilled_fresh": {"objective": Distill(teacher=TEACHER, start="fresh", alpha_cos=0.0, temperature=3.0)},
    "distilled_init": {"init": BASE, "objective": Distill(teacher=TEACHER, teacher_model=WIDE)},
}


def shown(folder: Path, **options) -> tuple[str, dict]:
    facts = read_facts(folder)
    chosen = CardOptions(**options)
    return to_markdown(card(facts, [], chosen), "plots"), yaml.safe_load(front_matter(facts, chosen)[4:-4])


def made(tmp_path: Path, kind: str, origin: dict | None = None) -> Path:
    folder = fake_run.write(tmp_path / kind, dataclasses.replace(fake_run.run(), **KINDS[kind]))
    if origin is not None:
        RunFolder(folder).origin.write_text(json.dumps(origin))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_kind_of_run_did_not_do_is_not_said(tmp_path: Path, kind: str) -> None:
    text, front = shown(made(tmp_path, kind))
    run: Run = dataclasses.replace(fake_run.run(), **KINDS[kind])
    distilled = isinstance(run.objective, Distill)
    assert (AIM in text) == (not distilled)
    assert ("random weights" in text) == (kind in ("scratch", "z_loss", "distilled_fresh"))
    assert ("teacher" in text) == distilled
    assert ("LoRA" in text) == (kind == "lora")
    assert ("its own card says" in text) == bool(run.init or distilled)
    assert text.count(BASE) >= 3 * bool(run.init)
    assert (BASE in text) == bool(run.init)
    assert (TEACHER in text) == distilled
    whole = kind in ("scratch", "z_loss", "init", "revision") or distilled
    assert ("6 per weight of a matmul" in text) == whole
    assert ("z-loss" in text) == (kind == "z_loss")
    assert ("distillation" in front["tags"]) == distilled
    expected = "fine-tuning" if run.init else "distillation" if distilled else "pre-training"
    assert front["co2_eq_emissions"]["training_type"] == expected
    assert front.get("base_model") == (BASE if run.init else None)
    assert front.get("base_model_relation") == (("adapter" if kind == "lora" else "finetune") if run.init else None)


def test_the_terms_of_a_distillation_are_those_that_had_a_weight(tmp_path: Path) -> None:
    text, _ = shown(made(tmp_path, "distilled"))
    said = text.replace("\\", "")
    assert "5 x 4 KL(teacher || student), both at temperature 2 + 2 x the cross-entropy of the next token + 1 x" in said
    assert "layers 0, 2 of its teacher" in text
    text, _ = shown(made(tmp_path, "distilled_fresh"))
    assert "5 x 9 KL(teacher || student), both at temperature 3 + 2 x" in text.replace("\\", "")
    assert "cosine" not in text


def test_the_base_of_a_folder_is_what_the_run_recorded_of_it(tmp_path: Path) -> None:
    config = dataclasses.replace(fake_run.run(), init=str(tmp_path), trainable=LoRA())
    folder = fake_run.write(tmp_path / "local", config)
    text, front = shown(folder)  # a folder, of which the hub knows nothing and which it refuses as a base_model
    assert str(tmp_path) in text
    assert "base_model" not in front
    assert shown(folder, base_model="me/mine")[1]["base_model"] == "me/mine"
    record = {
        "source": str(tmp_path),
        "hub": "other/name",
        "quantized": True,
        "notes": ["the table was cut to 500 rows"],
    }
    RunFolder(folder).origin.write_text(json.dumps(record))
    text, front = shown(folder)
    assert (front["base_model"], front["base_model_relation"]) == ("other/name", "adapter")
    assert "kept in 4 or 8 bits" in text
    assert "the table was cut" in text


def test_a_run_is_as_old_as_its_first_session(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.record_run(fake_run.run(), "first")
    record = json.loads(folder.record.read_text())
    folder.record.write_text(json.dumps(record | {"started": "2024-12-31T23:59:00Z", "finished_step": 5}))
    folder.record_run(dataclasses.replace(fake_run.run(), evals=Evals(every=3)), "second", {"history": []})
    record = json.loads(folder.record.read_text())
    assert (record["started"], record["finished_step"], record["command"]) == ("2024-12-31T23:59:00Z", 5, "second")
    entry = {"restart": 1, "reason": "", "time": "2025-01-01T00:00:00Z"}
    folder.restarts.write_text(json.dumps(entry) + "\n")
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in fake_run.rows()))
    text, _ = shown(folder.path)
    assert "| Restarts | 1 |" in text
    assert "year = 2024" in text


def test_a_run_of_before_is_as_old_as_its_first_session_too(tmp_path: Path) -> None:
    """Its run.json has the time of the last one."""
    early = fake_run.SESSION | {"started": "2025-12-31T20:00:00Z"}
    folder = fake_run.write(tmp_path / "old", sessions=(early, fake_run.SESSION | {"first_step": 50}))
    (folder / "restarts.jsonl").write_text(json.dumps({"time": "2025-12-31T21:00:00Z"}) + "\n")
    text, _ = shown(folder)
    assert "| Restarts | 1 |" in text
    assert "year = 2025" in text
    assert "Software of the last session" in text
