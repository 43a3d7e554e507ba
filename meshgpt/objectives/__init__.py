"""What training minimises: next-token cross-entropy, distillation, and the proof that documents stay apart."""

from meshgpt.objectives.distillation import Distill
from meshgpt.objectives.loss import NextToken

__all__ = ["Distill", "NextToken"]
