"""GPT-2 52M of the GPT-2 family by scaling law: 8 layers of 512, 4.6B tokens of OpenWebText.

    meshgpt prepare hf:Skylion007/openwebtext/train:text --tokenizer GPT2 --val-fraction 0.012 --out data/openwebtext
    meshgpt train configs/mosaic_gpt2_52m.py            # --smoke: a minute on a CPU, on another text

Hardware: 8 A100; as published 2:44 hours of them, with dropout of 0.1. `meshgpt plan memory` with
`--topology rtx3060` (or another) says what one GPU needs, `meshgpt compile` with `--topology a100x8` how fast it is.
Expected: validation loss 3.43, perplexity 30.88; Kaplan et al. 2020 predict 32.54
(`meshgpt plan budget`, docs/scaling.md). GPT2 is a folder with GPT-2's tokenizer.

The published card gives sizes and tokens; the rest is from gpt2_52m.yaml in Composer (commit 055e58b), whose
9,000 batches are 4.72B tokens. Its amp is float16 or bfloat16 by machine; here it is what the device has.
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
        model=dataclasses.replace(largest.model, n_layers=8, n_heads=8, d_model=512),
        steps=8_800,
        optim=dataclasses.replace(largest.optim, peak_lr=1.5e-3, warmup_steps=88),
        run_dir="",
    )
