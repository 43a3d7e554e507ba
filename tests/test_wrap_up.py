"""What a run says and checks around its end."""

import dataclasses
import errno
import json
import shutil
from pathlib import Path

import pytest
from runs import Here, Workshop

from meshgpt.config import Samples
from meshgpt.data.tokenizer import load_tokenizer
from meshgpt.errors import UserError
from meshgpt.training import finish
from meshgpt.training.run_folder import RunFolder


def test_samples_are_refused_before_the_training(finished: Path):
    folder = RunFolder(finished)
    run, tokenizer = folder.read_run(), load_tokenizer(folder.tokenizer)
    finish.check_samples(run, tokenizer)
    finish.check_samples(dataclasses.replace(run, samples=Samples(prompts=())), tokenizer)
    with pytest.raises(UserError, match=r"'xxxx.*of --samples\.prompts has .* context is 32.*at most 31"):
        finish.check_samples(dataclasses.replace(run, samples=Samples(prompts=("", "x" * 99))), tokenizer)
    with pytest.raises(UserError, match="top_p"):
        finish.check_samples(dataclasses.replace(run, samples=Samples(top_p=2.0)), tokenizer)


def test_the_summary_names_what_is_there_and_nothing_else(finished: Path, tmp_path: Path):
    run = RunFolder(finished).read_run()
    said = finish.summary(run, RunFolder(finished))
    assert said.startswith("finished: 20 steps, 5,120 tokens, validation loss ")
    assert "bits per byte (gzip -9 needs " in said
    assert f"meshgpt generate {finished}" in said
    assert "--steps 40" in said
    assert "--resume never" in said
    bare = RunFolder(tmp_path)
    shutil.copyfile(finished / "run.json", bare.record)
    bare.metrics.write_text(json.dumps({"step": 20, "loss": 3.0}) + "\n")
    said = finish.summary(dataclasses.replace(run, export="none", samples=Samples(prompts=())), bare)
    assert "validation" not in said
    assert "samples" not in said
    assert "Hugging Face" not in said


def test_samples_show_prompt_and_continuation(finished: Path):
    text = (finished / "samples.txt").read_text()
    assert "--- sample 1, prompt 'def '\ndef " in text
    assert "--- sample 2, prompt 'import '\nimport " in text


@pytest.mark.parametrize("broken", ["plot_loss", "generate_text", "summary"])
def test_what_only_decorates_keeps_no_run_from_its_export(
    workshop: Workshop, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
):
    flags = (workshop.recipe(tmp_path), "--run-dir", tmp_path / "run", "--steps", 5, "--eval-batches", 1)

    def fails(*arguments: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(finish, broken, fails)
        ended = here.train(*flags)
    assert ended.code == 0, ended
    assert "could not be made: " in ended.out
    assert "Traceback" not in ended.out + ended.err
    folder = RunFolder(tmp_path / "run")
    assert folder.finished_step() == 5
    assert (folder.export / "model.safetensors").is_file()
    if broken != "summary":
        again = here.train(*flags)
        assert again.code == 0, again
        assert "could not be made" not in again.out
        assert folder.plot.is_file()
        assert folder.samples.is_file()
        assert "this run is finished" in here.train(*flags).out
