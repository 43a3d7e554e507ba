"""Folders of runs as training leaves them, written by hand: no training, no devices."""

import json
import math
from pathlib import Path

from meshgpt.config import Data, Run, to_json
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.optim.config import AdamW, Cosine

TINY = GPT2Config(vocab_size=500, n_positions=64, n_layers=2, n_heads=2, d_model=32)
SESSION = {
    "started": "2026-01-02T03:04:05Z",
    "seen": "2026-01-02T04:04:05Z",
    "seconds": 3600.0,
    "first_step": 0,
    "last_step": 100,
    "devices": 8,
    "device_kind": "NVIDIA A100-SXM4-80GB",
    "processes": 1,
    "parameters": 1,
    "flops_per_token": 1,
}


def run(model=TINY, steps=100, store="", **fields) -> Run:
    optim = AdamW(peak_lr=1e-3, warmup_steps=10, schedule=Cosine())
    return Run(model=model, data=Data(store=store), steps=steps, global_batch=8, optim=optim, **fields)


def rows(steps=100, every=5):
    """Figures that fall from 6 nats to 3, evaluated every 25 steps."""
    for step in range(every, steps + 1, every):
        loss = 3 + 3 * math.exp(-step / 30)
        row = {"step": step, "tokens": step * 512, "loss": loss, "grad_norm": 1 / step, "learning_rate": 1e-3}
        row |= {"tokens_per_second": 1e4 + step}
        if step % 25 == 0:
            row |= {"val_loss": loss + 0.1, "val_bits_per_byte": loss / 2, "gzip_bits_per_byte": 2.5}
        yield row


def write(folder: Path, config: Run | None = None, figures=None, sessions=(SESSION,), tail="", evals=None) -> Path:
    folder.mkdir(parents=True)
    record = {
        "meshgpt": "0.1.0",
        "run": to_json(config or run()),
        "seed": 0,
        "command": "meshgpt train recipe.py",
        "git_revision": None,
        "python": "3.11.0",
        "versions": {"jax": "0.10.2"},
        "started": "2026-01-02T03:04:05Z",
        "finished_step": None,
    }
    (folder / "run.json").write_text(json.dumps(record))
    lines = "".join(json.dumps(row) + "\n" for row in (rows() if figures is None else figures))
    (folder / "metrics.jsonl").write_text(lines + tail)
    (folder / "sessions.json").write_text(json.dumps(list(sessions)))
    if evals is not None:
        (folder / "evals").mkdir()
        for step, content in evals.items():
            (folder / "evals" / f"{step}.json").write_text(json.dumps(content))
    return folder


def harness(acc: float, perplexity: float) -> dict:
    """Results as the lm-evaluation-harness 0.4 writes them, with what it writes besides figures."""
    return {
        "results": {
            "hellaswag": {
                "alias": "hellaswag", "sample_len": 10042,
                "acc,none": acc - 0.02, "acc_stderr,none": 0.004, "acc_norm,none": acc, "acc_norm_stderr,none": 0.0046,
            },
            "lambada_openai": {
                "alias": "lambada_openai", "perplexity,none": perplexity, "perplexity_stderr,none": "N/A",
                "acc,none": acc / 2, "acc_stderr,none": 0.006,
            },
        },
        "n-shot": {"hellaswag": 10, "lambada_openai": 0},
        "higher_is_better": {"hellaswag": {"acc": True, "acc_norm": True}, "lambada_openai": {"perplexity": False}},
        "n-samples": {"hellaswag": {"original": 10042, "effective": 10042}},
        "config": {"model": "meshgpt"},
    }  # fmt: skip
