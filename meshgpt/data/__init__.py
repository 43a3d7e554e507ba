"""Text to token stores, and token stores to batches; see docs/data.md."""
