"""What the compiled train step of small models costs, by XLA's own count: `python tests/step_costs.py` records it.

The counts are kept in tests/data/step_costs.json for each version of jax, whose compiler decides them.
"""

import json
from pathlib import Path

import jax
import tiny

from meshgpt.config import Data, Run
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.gptj import GPTJConfig
from meshgpt.models.model import ModelConfig
from meshgpt.training.program import Program

RECORD = Path(__file__).parent / "data" / "step_costs.json"
COUNTED = ("flops", "bytes accessed")
MODELS: dict[str, ModelConfig] = {
    "gpt2": GPT2Config(vocab_size=1000, n_positions=64, n_layers=2, n_heads=4, d_model=64),
    "gptj": GPTJConfig(vocab_size=1000, n_positions=64, n_layers=2, n_heads=4, d_model=64, rotary_dim=8),
}
MESHES = {"1 device": {}, "fsdp=2 tensor=2": {"fsdp": 2, "tensor": 2}}


def measure(model: str, mesh: str) -> dict[str, float]:
    """The counts of one compiled step, on one device of the mesh."""
    run = Run(model=MODELS[model], data=Data(), steps=100, global_batch=4)
    with jax.set_mesh(tiny.mesh(**MESHES[mesh])):
        analysis = Program(run=run).lower().compile().cost_analysis()
    return {name: analysis[name] for name in COUNTED}


def recorded() -> dict[str, dict[str, dict[str, float]]]:
    """The counts by jax's version and case."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def case(model: str, mesh: str) -> str:
    return f"{model}, {mesh}"


if __name__ == "__main__":
    import conftest  # noqa: F401  (its devices and settings)

    costs = {case(model, mesh): measure(model, mesh) for model in MODELS for mesh in MESHES}
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(recorded() | {jax.__version__: costs}, indent=1) + "\n", encoding="utf-8")
