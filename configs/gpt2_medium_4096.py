"""gpt2-medium-4096: 380M parameters, 26 layers, a context of 4,096, 13.5B tokens, on a card of 12 GB.

    meshgpt prepare TEXT... --tokenizer GPT2 --out data/slimpajama-1         # half of SlimPajama-627B
    meshgpt prepare TEXT... --tokenizer GPT2 --out data/slimpajama-2         # another 30%
    meshgpt train configs/gpt2_medium_4096.py                                # 4-bit AdamW
    meshgpt train configs/gpt2_medium_4096.py:eight_bit --resume-with-changes    # and on with 8 bits
    meshgpt plan memory configs/gpt2_medium_4096.py --topology rtx3060       # does it fit: needs no GPU

Hardware: one GPU of 12 GB with one row at a time. The published run took five days of two RTX A5000 and then went on on
an RTX 3060. Expected (published): HellaSwag 0.3095, and validation losses of 2.75 at step 19,700, 2.64 at 36,900, 2.49
at 51,650, on its own split.

Published: float16; 6e-5 to 4e-4 over 3,000 steps of 262,144 tokens, 4e-4 with a slight cosine falloff over the next
11.7B tokens, then a constant 9e-5 for 1B more; 4-bit AdamW on the RTX 3060, 8-bit later, the subset of the text changed
after 12.5B tokens. Not published: how slight the falloff was (to 95% here), betas and decay (this package's). On the
A5000s it was plain AdamW: `two_cards`.
"""

import dataclasses

from meshgpt.checkpoint.manager import Checkpointing
from meshgpt.config import Data, Run, Samples
from meshgpt.data.mixture import Source, Stage
from meshgpt.models.layers import Execution
from meshgpt.models.model import GPT2Config
from meshgpt.models.precision import Precision
from meshgpt.optim.config import AdamW, AdamW4bit, AdamW8bit, Piece, Piecewise

PEAK = 4e-4
SCHEDULE = Piecewise(
    start=6e-5 / PEAK,
    pieces=(
        Piece(steps=3_000, to=1.0),
        Piece(steps=44_650, to=0.95, shape="cosine"),
        Piece(steps=4_000, to=9e-5 / PEAK, shape="constant"),
    ),
)


def config() -> Run:
    first = Stage(sources=(Source(store="data/slimpajama-1"),), until_step=47_650)
    second = Stage(sources=(Source(store="data/slimpajama-2"),))
    return Run(
        model=GPT2Config(n_positions=4096, n_layers=26, n_heads=16, d_model=1024),
        data=Data(mixture=(first, second)),
        steps=51_650,
        global_batch=64,
        accumulate=64,
        optim=AdamW4bit(peak_lr=PEAK, warmup_steps=0, schedule=SCHEDULE),
        precision=Precision(compute="float16"),
        execution=Execution(remat="named"),
        eval_every=500,
        eval_batches=4,
        checkpointing=Checkpointing(every=500, keep_every=5_000),
        samples=Samples(prompts=("The meaning of life is",)),
    )


def eight_bit() -> Run:
    """The same with 8-bit AdamW, whose state waits in the host's memory (the paged AdamW of bitsandbytes)."""
    paged = AdamW8bit(peak_lr=PEAK, warmup_steps=0, schedule=SCHEDULE, state_memory="pinned_host")
    return dataclasses.replace(config(), optim=paged)


def two_cards() -> Run:
    """The same with plain AdamW on two cards of 24 GB, two rows at a time on each."""
    plain = AdamW(peak_lr=PEAK, warmup_steps=0, schedule=SCHEDULE)
    return dataclasses.replace(config(), optim=plain, accumulate=16)
