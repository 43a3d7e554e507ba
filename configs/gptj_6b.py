"""GPT-J 6B as it was trained: 402 billion tokens in 383,500 steps of 512 x 2048 (Wang and Komatsuzaki 2021).

    meshgpt compile configs/gptj_6b.py --topology v3-256       # does it fit, how long does it take: needs no TPU
    TYPE=v3-256 launch/tpu_pod.sh run configs/gptj_6b.py       # README, "From a laptop to a pod"
    meshgpt eval runs/gptj_6b --tasks lambada_openai,winogrande,hellaswag,piqa      # as the published card

Hardware: TPU v3-256 (128 chips of 2 devices), the pod of the original; any slice of 64 devices or more by the same
line. Hours and cost: `meshgpt compile` estimates them for each slice; 1.5e22 FLOPs is 22 days of a v3-256 at half of
its peak, 68,000 chip-hours. Expected: LAMBADA perplexity 3.99 and accuracy 69.7%, Winogrande 65.3%, HellaSwag 66.1%,
PIQA 76.5% (the published model's, on the Pile).
Data: a token store at data/pile in GPT-2's tokens, `meshgpt prepare TEXT --tokenizer GPT2 --out data/pile`.
"""

from meshgpt.checkpoint.manager import Checkpointing
from meshgpt.config import Data, Run, Samples
from meshgpt.distributed.mesh import MeshShape
from meshgpt.models.layers import Execution
from meshgpt.models.model import GPTJConfig
from meshgpt.objectives.loss import NextToken
from meshgpt.optim.config import AdamW, Cosine


def config() -> Run:
    return Run(
        model=GPTJConfig(),
        data=Data(store="data/pile"),
        steps=383_500,
        global_batch=512,
        accumulate=16,
        optim=AdamW(
            peak_lr=1.2e-4,
            warmup_steps=3_000,
            schedule=Cosine(final=0.1, steps=300_000),
            b1=0.9,
            b2=0.999,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        objective=NextToken(z_loss=1e-4),
        execution=Execution(unroll=1, remat="full"),
        # The original's 8 shards of every matmul; what is left of the slice holds the rest in slices.
        mesh=MeshShape(data=1, fsdp=-1, tensor=8),
        eval_every=1_000,
        eval_batches=8,
        checkpointing=Checkpointing(every=500, keep=3, keep_every=10_000),
        samples=Samples(prompts=("In a shocking finding, scientists discovered a herd of unicorns",)),
        export="bfloat16",
    )
