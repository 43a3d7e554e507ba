"""GPT-2 and GPT-J: the math, their parameters as a tree, and what of them is trained. No file, optimizer or loop."""

from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.gptj import GPTJConfig
from meshgpt.models.layers import Execution
from meshgpt.models.model import Model, ModelConfig
from meshgpt.models.precision import Precision

__all__ = ["Execution", "GPT2Config", "GPTJConfig", "Model", "ModelConfig", "Precision"]
