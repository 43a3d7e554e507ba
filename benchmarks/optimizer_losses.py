"""Whether low-bit AdamW trains as AdamW does: the same data, seed and schedule, and the validation losses in one plot.

    python benchmarks/optimizer_losses.py --out runs/optimizers --plot docs/images/low_bit_losses.png

The text is the standard library of the Python that runs it. Each optimizer trains a small GPT-J for the same steps;
what is there already is not trained again. Printed is how far each final validation loss lies from float32 AdamW's.
"""

import dataclasses
from pathlib import Path

import record

from meshgpt import runtime
from meshgpt.checkpoint.manager import Checkpointing
from meshgpt.config import Data, Run, Samples
from meshgpt.data.prepare import Prepare
from meshgpt.models.layers import Execution
from meshgpt.models.model import GPTJConfig
from meshgpt.optim.config import AdamW, AdamW4bit, AdamW8bit, Cosine, Optimizer
from meshgpt.train import train
from meshgpt.training.trackers import read_json_lines

RATES = {"peak_lr": 2e-3, "warmup_steps": 50, "schedule": Cosine(final=0.05)}
OPTIMIZERS: dict[str, tuple[str, Optimizer]] = {
    "adamw": ("AdamW, float32", AdamW(**RATES)),
    "adamw8bit": ("AdamW, 8 bits", AdamW8bit(**RATES)),
    "adamw4bit": ("AdamW, 4 bits", AdamW4bit(**RATES)),
}


def recipe(folder: Path, steps: int) -> Run:
    store = folder / "data"
    return Run(
        model=GPTJConfig(vocab_size=1024, n_positions=64, n_layers=2, n_heads=4, d_model=128, rotary_dim=16),
        data=Data(
            prepare=Prepare(
                sources=("stdlib",), out=str(store), train_tokenizer="bpe", vocab_size=1024, val_fraction=0.02
            )
        ),
        steps=steps,
        global_batch=16,
        execution=Execution(unroll=0),
        eval_every=max(steps // 10, 1),
        eval_batches=100,
        log_every=max(steps // 20, 1),
        checkpointing=Checkpointing(every=steps),
        samples=Samples(prompts=()),
        export="none",
    )


def losses(folder: Path) -> tuple[list[int], list[float]]:
    """Steps and validation losses of a run."""
    rows = [row for row in read_json_lines(folder / "metrics.jsonl") if row.get("val_loss") is not None]
    return [int(row["step"]) for row in rows], [float(row["val_loss"]) for row in rows]


def plot(curves: dict[str, tuple[list[int], list[float]]], path: Path) -> None:
    """The validation losses, and below how far each lies from the first's, in percent."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 6), height_ratios=(2, 1), layout="constrained")
    first = next(iter(curves.values()))[1]
    for label, (steps, values) in curves.items():
        above.plot(steps, values, marker="o", markersize=3, label=label)
        below.plot(steps, [100 * (a / b - 1) for a, b in zip(values, first, strict=True)], marker="o", markersize=3)
    above.set_ylabel("validation loss, nats a token")
    above.legend()
    below.set_ylabel("against float32, %")
    below.set_xlabel("step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/optimizers"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    asked = parser.parse_args()
    begun = record.begin("optimizer_losses", asked)
    runtime.start()
    curves = {}
    for name, (label, optim) in OPTIMIZERS.items():
        folder = asked.out / name
        train(dataclasses.replace(recipe(asked.out, asked.steps), optim=optim, run_dir=str(folder)))
        curves[label] = losses(folder)
    final = next(iter(curves.values()))[1][-1]
    for label, (steps, values) in curves.items():
        print(f"{label}: {values[-1]:.4f} after {steps[-1]:,} steps, {100 * (values[-1] / final - 1):+.2f}%")
    begun.write({label: {"steps": steps, "losses": values} for label, (steps, values) in curves.items()}, {})
    if asked.plot:
        plot(curves, asked.plot)


if __name__ == "__main__":
    main()
