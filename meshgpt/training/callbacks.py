"""What a user's own code hears of a run while it trains."""

from collections.abc import Mapping
from pathlib import Path


class Callback:
    """Hears of a run's steps, evaluations and checkpoints; override what you need.

    Methods are called on process 0 alone, in the thread that trains, between two steps: what takes long there holds the
    training up, and an exception ends the run. `step` counts from 1.
    """

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """After every step, whether or not it is logged.

        Args:
            metrics: `loss` (nats a token), `grad_norm` before clipping, `learning_rate`, `tokens` of this step,
                `skipped_steps`; with float16 also `loss_scale`, with another objective than the next token `objective`.
        """

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """After an evaluation.

        Args:
            metrics: `val_loss` (nats a token), `val_bits_per_byte`, and what else `Run.evals` asks for.
        """

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """After a checkpoint was handed to its writer, which works in the background.

        Args:
            folder: where it will be, complete once the file of digests of the same name lies beside it.
        """
