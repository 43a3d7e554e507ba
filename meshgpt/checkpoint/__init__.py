"""Saved state that can be trusted: written by orbax in the background, used only where every digest matches."""

from meshgpt.checkpoint.manager import Checkpointer, Checkpointing

__all__ = ["Checkpointer", "Checkpointing"]
