"""A training run: its step, its folder, its data, the loop, and what it leaves behind."""
