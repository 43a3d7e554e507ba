"""Whether a taught student is better than one that learns from the text alone: same student, start, steps and data.

    python benchmarks/distillation.py --text articles.jsonl.gz --plot docs/images/distillation.png

A teacher is trained on the text (by default the standard library of the Python that runs it). Then for each seed, which
orders the text, two students start from every other layer of it: one with the three losses of distillation, one with
the next-token loss alone. What is there already is not trained again.
"""

import dataclasses
import statistics
from pathlib import Path

import record

from meshgpt import runtime
from meshgpt.checkpoint.manager import Checkpointing
from meshgpt.config import Data, Run, Samples
from meshgpt.data.prepare import Prepare
from meshgpt.models.layers import Execution
from meshgpt.models.model import GPT2Config
from meshgpt.objectives.distillation import Distill
from meshgpt.optim.config import AdamW, Cosine
from meshgpt.train import train
from meshgpt.training.trackers import read_json_lines

VOCAB, DEPTH = 1024, 6


def teacher(folder: Path, text: str, steps: int) -> Run:
    return Run(
        model=GPT2Config(vocab_size=VOCAB, n_positions=64, n_layers=DEPTH, n_heads=4, d_model=96),
        data=Data(
            prepare=Prepare(
                sources=(text,), out=str(folder / "data"), train_tokenizer="bpe", vocab_size=VOCAB, val_fraction=0.01
            )
        ),
        steps=steps,
        global_batch=16,
        optim=AdamW(peak_lr=2e-3, warmup_steps=steps // 10, schedule=Cosine(final=0.05)),
        execution=Execution(unroll=0),
        eval_every=max(steps // 10, 1),
        eval_batches=40,
        log_every=max(steps // 20, 1),
        checkpointing=Checkpointing(every=steps),
        samples=Samples(prompts=()),
        export="none",
        run_dir=str(folder / "teacher"),
    )


def student(of: Run, folder: Path, seed: int, steps: int, taught: bool) -> Run:
    """A student that is taught, or one that starts as it and hears the text alone."""
    objective = Distill(teacher=of.run_dir)
    if not taught:
        objective = dataclasses.replace(objective, alpha_ce=0.0, alpha_mlm_or_clm=1.0, alpha_cos=0.0)
    return dataclasses.replace(
        of,
        model=dataclasses.replace(of.model, n_layers=DEPTH // 2),
        data=Data(store=str(folder / "data")),
        objective=objective,
        optim=AdamW(peak_lr=1e-3, warmup_steps=steps // 10, schedule=Cosine(final=0.05)),
        steps=steps,
        seed=seed,
        eval_every=max(steps // 10, 1),
        log_every=max(steps // 20, 1),
        checkpointing=Checkpointing(every=steps),
        run_dir=str(folder / f"{'taught' if taught else 'alone'}-{seed}"),
    )


def losses(run: Run) -> tuple[list[int], list[float]]:
    """Steps and validation losses of a run."""
    lines = read_json_lines(Path(run.run_dir) / "metrics.jsonl")
    rows = [row for row in lines if row.get("val_loss") is not None]
    return [int(row["step"]) for row in rows], [float(row["val_loss"]) for row in rows]


def plot(students: dict[tuple[bool, int], Run], of_teacher: float, path: Path) -> None:
    """The validation losses of all students, and the teacher's as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (taught, seed), run in students.items():
        label = ("taught" if taught else "text alone") if seed == 0 else None
        axes.plot(*losses(run), color="tab:blue" if taught else "tab:orange", label=label, marker=".")
    axes.axhline(of_teacher, color="gray", linestyle="--", label="teacher")
    axes.set(xlabel="step", ylabel="validation loss (nats a token)")
    axes.legend()
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def compare(
    folder: Path, text: str, teacher_steps: int, steps: int, seeds: int
) -> tuple[Run, dict[tuple[bool, int], Run]]:
    """Trains all of them; (the teacher, the students by whether they are taught and their seed)."""
    master = teacher(folder, text, teacher_steps)
    train(master)
    students = {
        (taught, seed): student(master, folder, seed, steps, taught)
        for seed in range(seeds)
        for taught in (True, False)
    }
    for run in students.values():
        train(run)
    return master, students


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--out", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--teacher-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    begun = record.begin("distillation", asked)
    runtime.start()
    master, students = compare(asked.out, asked.text, asked.teacher_steps, asked.steps, asked.seeds)
    of_teacher = losses(master)[1][-1]
    print(f"teacher: {of_teacher:.4f}")
    ends: dict[str, list[float]] = {}
    for taught in (True, False):
        last = ends["taught" if taught else "alone"] = [
            losses(run)[1][-1] for (kind, _), run in students.items() if kind == taught
        ]
        spread = statistics.stdev(last) if len(last) > 1 else 0.0
        each = ", ".join(f"{loss:.4f}" for loss in last)
        print(f"{'taught' if taught else 'text alone'}: {statistics.mean(last):.4f} +- {spread:.4f} ({each})")
    begun.write({"teacher": of_teacher, "students": ends}, {})
    if asked.plot:
        plot(students, of_teacher, asked.plot)


if __name__ == "__main__":
    main()
