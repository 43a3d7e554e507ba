"""Other programs that show a run's figures as it trains. Each is a `trackers.Tracker` and needs its own package."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from meshgpt.errors import UserError

Name: TypeAlias = Literal["tensorboard", "wandb"]


def open_sinks(
    names: Sequence[Name], folder: Path, config: Mapping[str, Any], resume_step: int | None
) -> list[TensorBoard | WeightsAndBiases]:
    """The sinks of these names for the run in `folder`, which has the configuration `config`.

    Raises:
      UserError: a package is missing.
    """
    make = {
        "tensorboard": lambda: TensorBoard(folder / "tensorboard", resume_step),
        "wandb": lambda: WeightsAndBiases(folder, config),
    }
    return [make[name]() for name in dict.fromkeys(names)]


class TensorBoard:
    """Writes scalars for TensorBoard, against steps, without TensorFlow (needs the extra `tensorboard`)."""

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        """Writes into `folder`; TensorBoard hides what an earlier run wrote there after `resume_step`."""
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError as error:
            raise UserError("TensorBoard logs need a package: pip install 'meshgpt[tensorboard]'") from error
        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=10)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def message(self, text: str) -> None:
        """Does nothing: TensorBoard holds figures only."""

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Writes to Weights & Biases (needs the extra `wandb`), offline unless the environment's WANDB_MODE is `online`.

    Offline, all lies in `wandb/` in the run's folder and nothing leaves the machine; `wandb sync` sends it when wanted.
    Restarts of a run share one id, which is made of the folder's path.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb  # type: ignore[import-not-found]
        except ModuleNotFoundError as error:
            raise UserError("Weights & Biases logs need a package: pip install 'meshgpt[wandb]'") from error
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "meshgpt"),
            name=folder.name,
            id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(folder),
            config=dict(config),
            mode="online" if os.environ.get("WANDB_MODE") == "online" else "offline",
            # Nothing but the figures: no console output, source code, git state or machine statistics.
            settings=wandb.Settings(console="off", disable_code=True, disable_git=True, x_disable_stats=True),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def message(self, text: str) -> None:
        """Does nothing: figures only."""

    def close(self) -> None:
        self._run.finish()
