"""meshgpt trains GPT-2 and GPT-J language models with JAX: the same recipe on a laptop CPU, one GPU, or a TPU pod."""

__version__ = "0.1.0"
