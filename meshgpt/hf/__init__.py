"""Models in and out of the Hugging Face format: one name table per family, import, export, and the proof of each.

`read_config` and `load` bring a folder in; `export` writes one and does not finish before `read_back` has reopened it
from disk and found every tensor and the logits equal to the live model's.
"""

from meshgpt.hf.config import ModelConfig, read_config
from meshgpt.hf.read import load
from meshgpt.hf.verify import Probe, Verdict, read_back
from meshgpt.hf.write import export

__all__ = ["ModelConfig", "Probe", "Verdict", "export", "load", "read_back", "read_config"]
