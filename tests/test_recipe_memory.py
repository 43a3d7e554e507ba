"""The recipes of 12 GB cards, compiled ahead for a device of 12 GiB: a TPU v5e simulated smaller, by its own compiler.

The same by the GPU's compiler, which is too large for CI, is in docs/memory.md.
"""

import dataclasses
from pathlib import Path

import pytest

from meshgpt import recipe
from meshgpt.errors import UserError
from meshgpt.hardware import topologies
from meshgpt.models.precision import Precision
from meshgpt.optim.config import learning_rate
from meshgpt.planning import aot

CONFIGS = Path(__file__).parent.parent / "configs"
LIMIT = 12 << 30


@pytest.fixture(autouse=True)
def quick():
    """Compiling in a third of the time, for peaks within a few percent."""
    aot.quiet_compiler()
    aot.set_effort(low=True)
    yield
    aot.set_effort(low=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "function"), [("gpt2_medium_4096", "config"), ("gpt2_medium_4096", "eight_bit"), ("gpt2023", "config")]
)
def test_a_recipe_fits_12_gib_at_its_batch(name: str, function: str):
    run = recipe.load(CONFIGS / f"{name}.py", function)
    # A TPU has no float16; bfloat16 takes as many bytes. Nor can it page 8 bits: there the state stays.
    optim = dataclasses.replace(run.optim, state_memory="device")
    run = dataclasses.replace(run, precision=Precision(compute="bfloat16"), optim=optim)
    found = aot.compile_for(run, topologies.parse("v5e-1"), hbm=LIMIT).memory
    assert found.limit == LIMIT
    assert found.peak < 0.95 * LIMIT
    assert found.peak > 2 * found.parameters
    bytes_a_parameter = found.optimizer / (found.parameters / 4)
    expected = {"gpt2_medium_4096config": 1.05, "gpt2_medium_4096eight_bit": 2.06, "gpt2023config": 8.0}[
        name + function
    ]
    assert bytes_a_parameter == pytest.approx(expected, rel=0.05, abs=0.02)


def test_paged_bytes_are_refused_on_tpu():
    run = recipe.load(CONFIGS / "gpt2_medium_4096.py", "eight_bit")
    run = dataclasses.replace(run, precision=Precision(compute="bfloat16"))
    with pytest.raises(UserError, match="cannot move moments of 8 or 4 bits"):
        aot.compile_for(run, topologies.parse("v5e-1"))


def test_gpt2023_is_512_by_1024_on_its_schedule():
    run = recipe.load(CONFIGS / "gpt2023.py")
    assert (run.global_batch, run.sequence_length, run.steps) == (512, 1024, 4_400)
    rate = learning_rate(run.optim, run.steps)
    assert float(rate(1_023)) == pytest.approx(1e-4)
    assert float(rate(511)) == pytest.approx(0.5e-4)
    assert float(rate(2_712)) == pytest.approx(0.5e-4, rel=1e-3)  # halfway from 1,024 to 4,400
    assert float(rate(4_400)) == 0.0


def test_gpt2_medium_4096_follows_the_published_rates():
    run = recipe.load(CONFIGS / "gpt2_medium_4096.py")
    assert run.global_batch * run.sequence_length == 262_144  # 786M tokens in 3,000 steps
    rate = learning_rate(run.optim, run.steps)
    assert float(rate(0)) == pytest.approx(6e-5)
    assert float(rate(3_000)) == pytest.approx(4e-4)
    assert 3.8e-4 <= float(rate(47_000)) < 4e-4
    assert [float(rate(step)) for step in (47_660, 51_649)] == pytest.approx([9e-5, 9e-5])
    later = recipe.load(CONFIGS / "gpt2_medium_4096.py", "eight_bit")
    assert later.optim.schedule == run.optim.schedule
    assert type(later.optim).__name__ == "AdamW8bit"
