"""The base that exported adapters name: one that PEFT can load, and the same as was trained under."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from hf_peers import GPT2_TINY, GPTJ_TINY, ONE, live, peer

from meshgpt import cli, convert
from meshgpt.cli import models
from meshgpt.training.pretrained import RECORD, base_for_others, import_model


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("theirs") / "gpt2"
    peer(GPT2_TINY).save_pretrained(folder)
    return folder


def imported(source, out: Path, surgery=convert.Surgery()) -> str:
    import_model(str(source), out, surgery, "float32", lambda line: None)
    return str(out)


def test_an_imported_folder_names_what_it_was_imported_from(theirs, tmp_path, on_mesh) -> None:
    with on_mesh():
        ours = imported(theirs, tmp_path / "ours")
    name, problem = base_for_others(ours)
    assert (name, problem) == (str(theirs), "")
    with torch.no_grad():
        transformers.AutoModelForCausalLM.from_pretrained(name)(torch.arange(8)[None])
    record = json.loads((tmp_path / "ours" / RECORD).read_text())
    record["source"] = "openai-community/gpt2"
    (tmp_path / "ours" / RECORD).write_text(json.dumps(record))
    assert base_for_others(ours) == ("openai-community/gpt2", "")
    del record["changed"]  # as before it was recorded
    (tmp_path / "ours" / RECORD).write_text(json.dumps(record | {"notes": ["vocabulary grown from 97 to 128 ids"]}))
    assert base_for_others(ours)[0] == ours


def test_what_surgery_changed_is_not_the_source(theirs, tmp_path, on_mesh) -> None:
    with on_mesh():
        ours = imported(theirs, tmp_path / "ours", convert.Surgery(vocab_size=128))
    name, problem = base_for_others(ours)
    assert name == ours
    assert f"meshgpt export {ours} --out BASE writes one" in problem


def test_gptj_as_phi_has_other_modules(tmp_path, on_mesh) -> None:
    params, probe = live(GPTJ_TINY, ONE)
    convert.export(params, GPTJ_TINY, None, tmp_path / "phi", probe=probe, family="phi")
    assert "is not a model that these adapters fit" in base_for_others(str(tmp_path / "phi"))[1]
    with on_mesh():
        ours = imported(tmp_path / "phi", tmp_path / "ours")
    assert base_for_others(ours)[0] == ours
    assert f"meshgpt export {ours}" in base_for_others(ours)[1]


def test_the_command_writes_that_base(theirs, tmp_path, on_mesh, monkeypatch, capsys) -> None:
    with on_mesh():
        same = imported(theirs, tmp_path / "same")
        grown = imported(theirs, tmp_path / "grown", convert.Surgery(vocab_size=128))
    written = []
    monkeypatch.setattr(convert, "export_adapter", lambda *a, **k: written.append(a[3]) or "compared")
    for init in (same, grown):
        run = SimpleNamespace(init=init, model=GPT2_TINY)
        opened = SimpleNamespace(run=run, params={}, part=None, tokenizer=None)
        monkeypatch.setattr(models, "open_adapters", lambda *a, opened=opened: opened)
        assert cli.main(["export", "--adapter", "run", "--out", str(tmp_path / "out")]) == 0
    assert written == [str(theirs), grown]
    assert capsys.readouterr().out.count("--out BASE writes one") == 1


@pytest.mark.parametrize("source", ["openai-community/gpt2", "owner/name@main"])
def test_hub_ids_and_folders_are_named_as_they_are(source, theirs) -> None:
    assert base_for_others(source) == (source, "")
    assert base_for_others(str(theirs)) == (str(theirs), "")
    assert "no Hugging Face folder" in base_for_others(str(theirs.parent))[1]
