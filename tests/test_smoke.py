"""`--smoke`: every recipe of ours at a size that a CPU trains."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from meshgpt import recipe, train
from meshgpt.errors import UserError
from meshgpt.models.model import GPT2Config, GPTJConfig
from meshgpt.optim.config import Piecewise
from meshgpt.smoke import STEPS
from meshgpt.training.trackers import read_json_lines

CONFIGS = Path(__file__).parent.parent / "configs"
TRAINED = ("mosaic_gpt2_52m", "mosaic_gpt2_83m", "mosaic_gpt2_125m", "gptj_6b")


def smoked(name: str, *flags: str):
    return recipe.parse([f"{CONFIGS / name}.py", "--smoke", *flags], "meshgpt train")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that the first run prepares, for all."""
    return tmp_path_factory.mktemp("text") / "data"


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_recipe_trains_at_its_smoke_size(name: str, tmp_path: Path, text: Path):
    run_dir = tmp_path / "run"
    if text.exists():
        shutil.copytree(text, run_dir / "data")
    assert train.main([f"{CONFIGS / name}.py", "--smoke", "--run-dir", str(run_dir)]) == 0
    rows = read_json_lines(run_dir / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    validation = [row["val_loss"] for row in rows if "val_loss" in row]
    assert losses[0] > 7  # log(2048) is 7.6
    assert losses[-1] < losses[0] - 0.5
    assert validation[-1] < validation[0]
    assert (run_dir / "export" / "model.safetensors").is_file()
    if not text.exists():
        shutil.copytree(run_dir / "data", text)


def test_what_a_recipe_asks_for_stays():
    small, large = smoked("gptj_6b"), recipe.load(CONFIGS / "gptj_6b.py")
    assert isinstance(small.model, GPTJConfig)
    assert (small.steps, small.run_dir) == (STEPS, "runs/gptj_6b-smoke")
    assert small.objective == large.objective
    assert small.execution == large.execution
    assert small.optim.b2 == large.optim.b2
    assert small.optim.schedule == dataclasses.replace(large.optim.schedule, steps=round(300_000 * STEPS / 383_500))
    medium = smoked("gpt2_medium_4096")
    assert isinstance(medium.model, GPT2Config)
    assert isinstance(medium.optim.schedule, Piecewise)
    assert sum(piece.steps for piece in medium.optim.schedule.pieces) == STEPS
    assert smoked("mosaic_gpt2_52m", "--steps", "7").steps == 7
    paged = recipe.parse([f"{CONFIGS / 'gpt2_medium_4096'}.py:eight_bit", "--smoke"], "meshgpt train")
    assert (paged.steps, paged.optim.state_memory) == (STEPS, "pinned_host")


def test_functions_of_a_recipe(tmp_path: Path):
    run = recipe.parse([f"{CONFIGS / 'gpt2_medium_4096'}.py:eight_bit", "--steps", "9"], "meshgpt train")
    assert (type(run.optim).__name__, run.optim.state_memory, run.steps) == ("AdamW8bit", "pinned_host", 9)
    with pytest.raises(UserError, match=r"has no function nothing\(\)"):
        recipe.load(CONFIGS / "quickstart.py", "nothing")
    own = tmp_path / "own.py"
    own.write_text(
        "import dataclasses\nfrom meshgpt import recipe\nfrom pathlib import Path\n"
        f"def config():\n    return recipe.load(Path({str(CONFIGS / 'quickstart.py')!r}))\n"
        "def smoke():\n    return dataclasses.replace(config(), steps=3, run_dir='')\n"
    )
    assert recipe.parse([str(own), "--smoke"], "meshgpt train").steps == 3
    with pytest.raises(UserError, match="needs a teacher"):
        smoked("distilgpt2")
