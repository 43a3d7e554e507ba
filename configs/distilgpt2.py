"""DistilGPT2: 6 layers of 12, 82M parameters of 124M, taught by GPT-2 124M (Sanh et al. 2019).

    meshgpt prepare hf:Skylion007/openwebtext/train:text --tokenizer GPT2 --out stores/openwebtext
    python -m meshgpt.train configs/distilgpt2.py

Published: 8 V100 of 16 GB for 168 hours on OpenWebTextCorpus, 149.2 kg CO2eq; perplexity of the test part of
WikiText-103 after fine-tuning on its training part 21.1, where the teacher has 16.3. From its command come the weights
of the losses (5, 2 and 1) and the temperature (2); from its `extract.py` the teacher's layers; from its `train.py` the
defaults of the rest: Adam at 5e-4, 5% of the steps warmup and linear decay, epsilon 1e-6, no weight decay, gradients
clipped at 5, 3 epochs, 5 x 50 sequences of a device in a step, on 8 devices 2,000 (here 2,048). The number of steps is
that of 3 epochs of 9 billion tokens. Two things differ: its position embeddings were frozen (--freeze_pos_embs) and are
trained here; its rows were of single documents and here text is packed.

GPT2 is a folder with GPT-2's tokenizer. Memory and time on what you have:
`meshgpt compile configs/distilgpt2.py --topology v5e-8`.
"""

from meshgpt.config import Data, Run
from meshgpt.models.layers import Execution
from meshgpt.models.model import GPT2Config
from meshgpt.objectives.distillation import Distill
from meshgpt.optim.config import AdamW, Linear


def config() -> Run:
    return Run(
        model=GPT2Config(n_layers=6, embd_dropout=0.1, attn_dropout=0.1, resid_dropout=0.1),
        data=Data(store="stores/openwebtext"),
        objective=Distill(teacher="gpt2", layers=(0, 2, 4, 7, 9, 11)),
        steps=12_900,
        global_batch=2048,
        accumulate=16,
        optim=AdamW(
            peak_lr=5e-4,
            warmup_steps=645,
            schedule=Linear(final=0.0),
            b2=0.98,
            eps=1e-6,
            weight_decay=0.0,
            clip_norm=5.0,
        ),
        execution=Execution(unroll=0),
        eval_every=500,
        eval_batches=8,
    )
