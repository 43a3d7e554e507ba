"""Models in and out: the Hugging Face format, the hub, and the checkpoints of Mesh-Transformer-JAX.

`open_source` opens whatever a model comes from, checked and ready to be loaded; `export` and `export_mtj` write, and do
not finish before what they wrote was reopened from disk and found equal to the live model.
"""

from meshgpt.convert.adam_state import Moments
from meshgpt.convert.adapter import export_adapter
from meshgpt.convert.bitsandbytes_write import BnbForm
from meshgpt.convert.gather import live_tensors
from meshgpt.convert.gguf import GgufForm, GgufKind
from meshgpt.convert.hf_config import ModelConfig, read_config
from meshgpt.convert.hf_read import load
from meshgpt.convert.hf_write import export
from meshgpt.convert.mesh_transformer_write import export_mtj
from meshgpt.convert.quantize import Contents, Form, contents_of, is_quantized, quantize
from meshgpt.convert.source import Source, open_source, tokenizer_of
from meshgpt.convert.surgery import Surgery
from meshgpt.convert.tokenizer import NO_TOKENIZER
from meshgpt.convert.verify import PROBE_COMPILER_OPTIONS, Probe, Verdict, read_back

__all__ = [
    "NO_TOKENIZER",
    "PROBE_COMPILER_OPTIONS",
    "BnbForm",
    "Contents",
    "Form",
    "GgufForm",
    "GgufKind",
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
    "tokenizer_of",
]
