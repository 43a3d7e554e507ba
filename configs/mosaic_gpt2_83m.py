"""GPT-2 83M of the GPT-2 family by scaling law: 10 layers of 640, 5.5B tokens of OpenWebText.

    meshgpt prepare hf:Skylion007/openwebtext/train:text --tokenizer GPT2 --val-fraction 0.012 --out data/openwebtext
    meshgpt train configs/mosaic_gpt2_83m.py            # --smoke: a minute on a CPU, on another text

Hardware: 8 A100; as published 4:52 hours of them, with dropout of 0.1. `meshgpt plan memory` with
`--topology rtx3060` (or another) says what one GPU needs, `meshgpt compile` with `--topology a100x8` how fast it is.
Expected: validation loss 3.28, perplexity 26.57; Kaplan et al. 2020 predict 27.84
(`meshgpt plan budget`, docs/scaling.md). GPT2 is a folder with GPT-2's tokenizer.

The published card gives sizes and tokens; the rest is from gpt2_83m.yaml in Composer (commit 1a34908), whose
11,000 batches are 5.77B tokens. Its amp is float16 or bfloat16 by machine; here it is what the device has.
"""

import dataclasses
from pathlib import Path

from meshgpt import recipe
from meshgpt.config import Run


def config() -> Run:
    """The 125M's run with other sizes, steps and learning rate."""
    largest = recipe.load(Path(__file__).with_name("mosaic_gpt2_125m.py"))
    return dataclasses.replace(
        largest,
        model=dataclasses.replace(largest.model, n_layers=10, n_heads=10, d_model=640),
        steps=10_500,
        optim=dataclasses.replace(largest.optim, peak_lr=1e-3, warmup_steps=105),
        run_dir="",
    )
