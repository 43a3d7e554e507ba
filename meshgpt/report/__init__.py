"""What a run was, from its folder: plots, a model card, a page to look at, and runs beside each other."""

from meshgpt.report.plots import plot_loss, smooth

__all__ = ["plot_loss", "smooth"]
