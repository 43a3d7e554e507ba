"""Fine-tune GPT-J 6B on your own text, from the weights on the hub or from Mesh-Transformer-JAX's own checkpoint.

    meshgpt prepare TEXT... --tokenizer GPT2 --out data/finetune
    meshgpt train configs/gptj_6b_finetune.py --init EleutherAI/gpt-j-6b
    meshgpt train configs/gptj_6b_finetune.py --init step_383500     # the original's, with its optimizer state

GPT2 is a folder with GPT-2's vocab.json and merges.txt, or tokenizer.json.

Hardware: one GPU of 141 GB (94 GiB in use with four rows of 2048 at a time), or a TPU slice with `--mesh.fsdp -1`.
1,000 steps of 32 x 2048 are 66 million tokens, 1.3 hours of an H200 at the 14,000 tokens/s that a plain JAX step was
measured at. Expected: the loss is your text's; it starts near that of the published model, and if it starts near 11,
the weights or the tokenizer are others. The learning rates are those of Mesh-Transformer-JAX's guide to fine-tuning
(1e-5 to 5e-5, ending at a fifth, after a warmup of 5 to 10% of the steps).
"""

from meshgpt.checkpoint.manager import Checkpointing
from meshgpt.config import Data, Run, Samples
from meshgpt.models.layers import Execution
from meshgpt.models.model import GPTJConfig
from meshgpt.optim.config import AdamW, Cosine


def config() -> Run:
    return Run(
        model=GPTJConfig(),
        data=Data(store="data/finetune"),
        steps=1_000,
        global_batch=32,
        accumulate=8,
        optim=AdamW(
            peak_lr=5e-5,
            warmup_steps=70,
            schedule=Cosine(final=0.2),
            b2=0.999,
            moment_dtype="bfloat16",
        ),
        execution=Execution(unroll=1, remat="dots"),
        eval_every=100,
        eval_batches=8,
        checkpointing=Checkpointing(every=250, keep=2),
        samples=Samples(prompts=("In a shocking finding, scientists discovered",)),
        export="bfloat16",
    )
