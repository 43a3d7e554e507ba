"""GPT2(023): GPT-2 124M brought up to 2023, 4,400 steps of 512 x 1,024 tokens on a card of 12 GB.

    meshgpt prepare TEXT... --tokenizer GPT2 --out data/cc2023        # and the same for data/arxiv and data/github
    meshgpt train configs/gpt2023.py --init openai-community/gpt2
    meshgpt plan memory configs/gpt2023.py --topology rtx3060         # does it fit: needs no GPU

Hardware: one GPU of 12 GB; the published run took 79 hours of an RTX 3060. Its compiled step needs 5.5 GiB there.
Expected: a final training loss of 2.73 (the published run's, on its own text). Data: 1.3B tokens of Common Crawl sites
of 2023, 540M of ArXiv and 390M of GitHub, which together are 2.23B; 4,400 steps see 2.31B, so that each is gone through
1.03 times. GPT2 is a folder with GPT-2's tokenizer. Published: peak 1e-4, 1,024 steps of warmup, then to 0 (the shape
is not said: a line here).
"""

from meshgpt.checkpoint.manager import Checkpointing
from meshgpt.config import Data, Run, Samples
from meshgpt.data.mixture import Source, Stage
from meshgpt.models.layers import Execution
from meshgpt.models.model import GPT2Config
from meshgpt.optim.config import AdamW, Linear


def config() -> Run:
    sources = (
        Source(store="data/cc2023", weight=1.30, max_epochs=1.1),
        Source(store="data/arxiv", weight=0.54, max_epochs=1.1),
        Source(store="data/github", weight=0.39, max_epochs=1.1),
    )
    return Run(
        model=GPT2Config(),
        data=Data(mixture=(Stage(sources=sources),)),
        steps=4_400,
        global_batch=512,
        accumulate=64,
        optim=AdamW(peak_lr=1e-4, warmup_steps=1_024, schedule=Linear(final=0.0)),
        execution=Execution(remat="named"),
        eval_every=200,
        eval_batches=8,
        checkpointing=Checkpointing(every=200),
        samples=Samples(prompts=("# About Covid-19\n- -\nThe Covid-19",)),
    )
