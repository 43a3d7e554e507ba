"""Models in and out: the Hugging Face format, the hub, and the checkpoints of Mesh-Transformer-JAX.

`open_source` opens whatever a model comes from, checked and ready to be loaded; `export` and `export_mtj` write, and do
not finish before what they wrote was reopened from disk and found equal to the live model.
"""

from meshgpt.hf.adapter import export_adapter
from meshgpt.hf.bnb_write import BnbForm
from meshgpt.hf.config import ModelConfig, read_config
from meshgpt.hf.gguf_file import GgufForm
from meshgpt.hf.live import live_tensors
from meshgpt.hf.moments import Moments
from meshgpt.hf.mtj_write import export_mtj
from meshgpt.hf.quantize import Contents, Form, contents_of, is_quantized, quantize
from meshgpt.hf.read import load
from meshgpt.hf.source import Source, open_source
from meshgpt.hf.surgery import Surgery
from meshgpt.hf.verify import PROBE_COMPILER_OPTIONS, Probe, Verdict, read_back
from meshgpt.hf.write import export

__all__ = [
    "PROBE_COMPILER_OPTIONS",
    "BnbForm",
    "Contents",
    "Form",
    "GgufForm",
    "ModelConfig",
    "Moments",
    "Probe",
    "Source",
    "Surgery",
    "Verdict",
    "contents_of",
    "export",
    "export_adapter",
    "export_mtj",
    "is_quantized",
    "live_tensors",
    "load",
    "open_source",
    "quantize",
    "read_back",
    "read_config",
]
