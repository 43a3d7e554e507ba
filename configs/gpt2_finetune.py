"""Fine-tune GPT-2 124M on your own text, from the weights on the hub: the recipe of GPT2(023).

    meshgpt prepare TEXT... --tokenizer GPT2 --out data/finetune
    meshgpt train configs/gpt2_finetune.py --init openai-community/gpt2

Any model of GPT-2's architecture serves as `--init`, a folder or a hub id; the model's sizes are then those of its
config.json. GPT2 is a folder with GPT-2's vocab.json and merges.txt, or tokenizer.json.

Hardware: one GPU of 12 GB, which took the model that this recipe is from 79 hours; less memory with a larger
`--accumulate`. 4,400 steps of 512 x 1024 are 2.3 billion tokens, 1.3 hours of an H200 at the 491,000 tokens/s that a
plain JAX step was measured at. Expected: the loss is your text's. From GPT-2's weights it starts near 3.3 nats on
text from the web and falls from the first evaluation on; if it starts near 11, the weights or the tokenizer are others.
"""

from meshgpt.checkpoint.manager import Checkpointing
from meshgpt.config import Data, Run, Samples
from meshgpt.models.model import GPT2Config
from meshgpt.optim.config import AdamW, Linear


def config() -> Run:
    return Run(
        model=GPT2Config(),
        data=Data(store="data/finetune"),
        steps=4_400,
        global_batch=512,
        accumulate=64,
        optim=AdamW(peak_lr=1e-4, warmup_steps=1_024, schedule=Linear(final=0.0)),
        eval_every=200,
        eval_batches=8,
        checkpointing=Checkpointing(every=200),
        samples=Samples(prompts=("The meaning of life is", "In 2023,")),
    )
