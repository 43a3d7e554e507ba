"""The console command: its verbs, its help, and how little it imports for it."""

import os
import subprocess
import sys

import pytest
from runs import Here

import meshgpt
from meshgpt import cli
from meshgpt.cli import verbs


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], [], ["--version"], ["tran"]], ids=str)
def test_what_needs_no_jax_imports_none(arguments: list[str]):
    program = (
        f"import sys; from meshgpt import cli; cli.main({arguments!r}); "
        "heavy = {'jax', 'numpy', 'tyro', 'orbax', 'rich', 'flax', 'tokenizers'} & sys.modules.keys(); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=os.environ)
    assert ended.returncode == 0, ended.stderr


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {verb} " in said for verb in verbs.VERBS)
    assert verbs.VERBS.keys() >= {"train", "prepare", "generate", "export", "doctor"}


def test_version(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"meshgpt {meshgpt.__version__}\n"


@pytest.mark.parametrize("verb", ["train", "prepare", "generate", "export"])
def test_every_verb_has_help(here: Here, verb: str):
    ended = here.cli(verb, "--help")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(f"usage: meshgpt {verb} ")


def test_a_verb_that_is_not_there_gets_a_suggestion(here: Here):
    here.cli("tran").refused("no verb 'tran'", "perhaps you meant 'train'", "usage: meshgpt VERB")
    here.cli("zzz").refused("no verb 'zzz'")


def test_doctor_takes_no_arguments_and_says_what_is_here(here: Here):
    here.cli("doctor", "now").refused("'now'")
    ended = here.cli("doctor")
    assert ended.code == 0
    assert "devices: 8 (cpu)" in ended.out
    assert f"meshgpt {meshgpt.__version__}" in ended.out
    assert "peak" in ended.out
    assert "memory" in ended.out
