"""What the compiled step must not do: timings are noise in CI, the compiler's output is not."""

import dataclasses
import math
import re

import jax
import pytest

from meshgpt.config import Data, Run
from meshgpt.distributed.mesh import MeshShape, make_mesh
from meshgpt.hardware import topologies
from meshgpt.models.model import GPT2Config, GPTJConfig
from meshgpt.objectives.loss import NextToken
from meshgpt.planning import aot
from meshgpt.training.memory import shard_bytes
from meshgpt.training.program import Program

ROWS, LENGTH, WIDTH = 6, 256, 256
RUN = Run(
    model=GPT2Config(vocab_size=20_000, n_positions=LENGTH, n_layers=3, n_heads=4, d_model=WIDTH),
    data=Data(),
    steps=1000,
    global_batch=ROWS,
    objective=NextToken(chunk_tokens=512),
)
GPTJ = GPTJConfig(vocab_size=20_000, n_positions=LENGTH, n_layers=3, n_heads=4, d_model=WIDTH, rotary_dim=16)


def arrays(text: str) -> list[tuple[str, str, int]]:
    """(instruction, dtype, elements) of every array that an optimized program computes."""
    found = re.findall(r"= (\w+)\[([\d,]*)\](?:\{[^}]*\})? (\w[\w-]*)\(", text)
    return [(name, dtype, math.prod(int(d) for d in shape.split(",") if d)) for dtype, shape, name in found]


@pytest.fixture(scope="module", params=[RUN.model, GPTJ], ids=["gpt2", "gptj"])
def here(request: pytest.FixtureRequest) -> tuple[Run, jax.stages.Compiled, int]:
    """A run, its step compiled for one CPU device, and the bytes of its state."""
    run = dataclasses.replace(RUN, model=request.param)
    with jax.set_mesh(make_mesh(MeshShape(), jax.devices()[:1])):
        program = Program(run=run)
        return run, program.lower().compile(), shard_bytes(program.abstract().items())


def test_the_state_is_updated_in_its_place(here: tuple[Run, jax.stages.Compiled, int]):
    _, compiled, state = here
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.alias_size_in_bytes == state
    assert analysis.output_size_in_bytes - state < 1024  # the metrics


def test_no_array_holds_the_logits_of_a_batch(here: tuple[Run, jax.stages.Compiled, int]):
    run, compiled, _ = here
    largest = max(size for _, _, size in arrays(compiled.as_text() or ""))
    assert largest < ROWS * LENGTH * run.model.padded_vocab / 2
    assert largest >= 512 * run.model.vocab_size  # those of a chunk are there: the pattern still reads the text


@pytest.mark.slow
def test_on_a_tpu_next_to_no_activation_is_transposed():
    """Two in all three layers and both passes: the input of the loss, and what comes back from it."""
    aot.quiet_compiler()
    compiled = aot.compile_for(RUN, topologies.parse("v5e-1")).step
    seen = arrays(compiled.as_text() or "")
    assert any(name == "fusion" for name, _, _ in seen)
    transposed = [size for name, _, size in seen if name == "transpose" and size >= ROWS * LENGTH * WIDTH]
    assert len(transposed) <= 2
    assert not [size for _, dtype, size in seen if dtype == "f32" and size >= ROWS * LENGTH * 20_000]
