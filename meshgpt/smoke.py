"""Any recipe at a size that a CPU trains in a minute: what `--smoke` runs."""

import dataclasses

from meshgpt.checkpoint.manager import Checkpointing
from meshgpt.config import Data, Evals, Run, Samples
from meshgpt.data.prepare import Prepare
from meshgpt.distributed.mesh import MeshShape
from meshgpt.errors import UserError
from meshgpt.models.model import GPTJConfig
from meshgpt.objectives.loss import NextToken
from meshgpt.optim.config import Constant, InverseSqrt, Optimizer, Piecewise, Schedule

STEPS = 100
VOCABULARY = 2048
_ROTARY = 16  # of heads of 32


def smoke(run: Run) -> Run:
    """`run` with a small model, the standard library's source as its text, and 100 steps.

    Optimizer, schedule (squeezed into the steps), precision and execution stay, so that what the recipe asks for is
    what is tried; weights to start from, a mixture, a mesh and evaluations of its own are left out.

    Raises:
      UserError: for a recipe that cannot do without what is left out.
    """
    if not isinstance(run.objective, NextToken):
        raise UserError("--smoke: this recipe needs a teacher, and --smoke fetches nothing: it has no such size")
    heads = {"rotary_dim": _ROTARY} if isinstance(run.model, GPTJConfig) else {}
    model = dataclasses.replace(
        run.model, vocab_size=VOCABULARY, n_positions=128, n_layers=2, n_heads=4, d_model=128, d_ff=0, **heads
    )
    text = Prepare(sources=("stdlib",), out="", train_tokenizer="bpe", vocab_size=VOCABULARY, tokenizer_bytes=1 << 20)
    return dataclasses.replace(
        run,
        model=model,
        data=Data(prepare=text),
        steps=STEPS,
        extend=0,
        global_batch=16,
        accumulate=min(run.accumulate, 2),
        seq_len=0,
        init="",
        trainable=Run.trainable,
        optim=_squeezed(run.optim, STEPS / run.steps),
        mesh=MeshShape(),
        eval_every=STEPS // 2,
        eval_batches=8,
        evals=Evals(),
        log_every=10,
        sinks=(),
        checkpointing=Checkpointing(every=STEPS // 2),
        samples=dataclasses.replace(run.samples, max_new_tokens=20) if run.samples.prompts else Samples(prompts=()),
        run_dir="",
    )


def _squeezed(optim: Optimizer, share: float) -> Optimizer:
    # A tenth of the steps, for so few, whatever the recipe's share: a warmup of one step is none.
    warmup = STEPS // 10 if optim.warmup_steps else 0
    return dataclasses.replace(optim, warmup_steps=warmup, schedule=_shorter(optim.schedule, share))


def _shorter(schedule: Schedule, share: float) -> Schedule:
    if isinstance(schedule, Piecewise):
        pieces = [dataclasses.replace(piece, steps=max(1, round(piece.steps * share))) for piece in schedule.pieces]
        return dataclasses.replace(schedule, pieces=tuple(pieces))
    if isinstance(schedule, Constant | InverseSqrt) or schedule.steps is None:
        return schedule
    return dataclasses.replace(schedule, steps=max(1, round(schedule.steps * share)))
