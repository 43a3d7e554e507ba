"""GPT-2 125M of the GPT-2 family by scaling law: 12 layers of 768, 6.7B tokens of OpenWebText.

    meshgpt prepare hf:Skylion007/openwebtext/train:text --tokenizer GPT2 --val-fraction 0.012 --out data/openwebtext
    meshgpt train configs/mosaic_gpt2_125m.py            # --smoke: a minute on a CPU, on another text

Hardware: 8 A100; as published 8:25 hours of them, with dropout of 0.1. `meshgpt plan memory` with
`--topology rtx3060` (or another) says what one GPU needs, `meshgpt compile` with `--topology a100x8` how fast it is.
Expected: validation loss 3.18, perplexity 24.04; Kaplan et al. 2020 predict 24.64
(`meshgpt plan budget`, docs/scaling.md). GPT2 is a folder with GPT-2's tokenizer.

The published card gives sizes and tokens; the rest is from gpt2_125m.yaml in Composer (commit 01f3028), whose
14,000 batches are 7.34B tokens. Its amp is float16 or bfloat16 by machine; here it is what the device has.
"""

from meshgpt.checkpoint.manager import Checkpointing
from meshgpt.config import Data, Run, Samples
from meshgpt.models.model import GPT2Config
from meshgpt.optim.config import AdamW, Cosine


def config() -> Run:
    return Run(
        model=GPT2Config(n_layers=12, n_heads=12, d_model=768, embd_dropout=0.1, attn_dropout=0.1, resid_dropout=0.1),
        data=Data(store="data/openwebtext"),
        steps=12_800,
        global_batch=512,
        accumulate=8,
        seed=17,
        optim=AdamW(
            peak_lr=6e-4,
            warmup_steps=128,
            schedule=Cosine(final=0.0),
            b1=0.9,
            b2=0.999,
            weight_decay=0.0,
            clip_norm=1.0,
        ),
        eval_every=1_000,
        eval_batches=195,
        checkpointing=Checkpointing(every=500, keep=2, keep_every=2_000),
        samples=Samples(prompts=("The meaning of life is", "In a shocking finding,")),
    )
