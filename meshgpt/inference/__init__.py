"""Text out of a model: generation with a key-value cache, and how the next token is drawn."""
