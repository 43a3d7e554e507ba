"""Optimizers and learning-rate schedules: a dataclass each, built into an optax transformation."""

from meshgpt.optim.config import Adafactor, AdamW, AdamW4bit, AdamW8bit, Common, Lion, Muon, Optimizer
from meshgpt.optim.schedules import Constant, Cosine, InverseSqrt, Linear, Piece, Piecewise

__all__ = [
    "Adafactor",
    "AdamW",
    "AdamW4bit",
    "AdamW8bit",
    "Common",
    "Constant",
    "Cosine",
    "InverseSqrt",
    "Linear",
    "Lion",
    "Muon",
    "Optimizer",
    "Piece",
    "Piecewise",
]
