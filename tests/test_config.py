"""The run as JSON and back, what may differ on resume, and what is refused."""

import dataclasses
import json

import pytest
import tiny

from meshgpt.checkpoint.manager import Checkpointing
from meshgpt.config import Data, Run, Samples, differences, from_json, may_differ, to_json
from meshgpt.data.prepare import Prepare
from meshgpt.distributed.mesh import MeshShape
from meshgpt.errors import UserError
from meshgpt.models.layers import Execution
from meshgpt.models.precision import Precision
from meshgpt.objectives.loss import NextToken
from meshgpt.optim.config import AdamW, Constant, Cosine, InverseSqrt, Linear, Piece, Piecewise

RUN = Run(model=tiny.GPTJ, data=Data(store="a store"), steps=10, global_batch=8)
PIECES = (Piece(steps=3, to=1.0), Piece(steps=4, to=0.5, shape="cosine"), Piece(steps=1, to=0.0, shape="constant"))
VARIANTS = {
    "gptj": RUN,
    "gpt2": dataclasses.replace(RUN, model=tiny.GPT2),
    "prepare": dataclasses.replace(
        RUN,
        data=Data(
            prepare=Prepare(sources=("a", "b"), out="", train_tokenizer="bpe", vocab_size=300, val_sources=("c",))
        ),
    ),
    "cosine": dataclasses.replace(RUN, optim=AdamW(schedule=Cosine(final=0.2, steps=7))),
    "linear": dataclasses.replace(RUN, optim=AdamW(schedule=Linear())),
    "constant": dataclasses.replace(RUN, optim=AdamW(schedule=Constant())),
    "inverse square root": dataclasses.replace(RUN, optim=AdamW(schedule=InverseSqrt(), peak_lr=1e-3)),
    "piecewise": dataclasses.replace(RUN, optim=AdamW(schedule=Piecewise(pieces=PIECES, start=0.1))),
    "the rest": dataclasses.replace(
        RUN,
        seq_len=8,
        accumulate=4,
        seed=2**32 - 1,
        objective=NextToken(z_loss=1e-4),
        precision=Precision(compute="bfloat16"),
        execution=Execution(unroll=0, remat="named"),
        mesh=MeshShape(data=2, fsdp=-1),
        checkpointing=Checkpointing(every=5, keep_every=10),
        samples=Samples(prompts=()),
        export="bfloat16",
        resume="must",
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_json_gives_the_same_run_back(name: str):
    text = json.dumps(to_json(VARIANTS[name]))
    assert from_json(Run, json.loads(text)) == VARIANTS[name]
    assert differences(json.loads(text), to_json(VARIANTS[name])) == []


def test_what_is_not_known_is_refused_by_name():
    document = to_json(RUN)
    with pytest.raises(UserError, match=r"run\.model is a 'LlamaConfig'"):
        from_json(Run, document | {"model": {"type": "LlamaConfig"}})
    with pytest.raises(UserError, match=r"run\.optim\.momentum is not known"):
        from_json(Run, document | {"optim": document["optim"] | {"momentum": 1}})
    with pytest.raises(UserError, match=r"run\.data\.store is a list"):
        from_json(Run, document | {"data": {"type": "Data", "store": [1]}})
    with pytest.raises(UserError, match=r"run .*steps"):
        from_json(Run, {name: value for name, value in document.items() if name != "steps"})


def test_differences_are_named_by_their_path():
    old = to_json(RUN)
    new = to_json(dataclasses.replace(RUN, steps=20, optim=AdamW(schedule=Linear(final=0.5)), model=tiny.GPT2))
    found = {name: (before, after) for name, before, after in differences(old, new)}
    assert found["steps"] == (10, 20)
    assert found["optim.schedule.type"] == ("Cosine", "Linear")
    assert found["optim.schedule.final"] == (0.1, 0.5)
    assert found["model.rotary_dim"] == (2, None)
    assert found["model.tied_head"] == (None, True)
    assert "global_batch" not in found


def test_what_decides_the_update_cannot_differ_on_resume():
    for name in ("steps", "mesh.data", "execution.remat", "data.store", "checkpointing.keep", "samples", "run_dir"):
        assert may_differ(name), name
    for name in ("seed", "global_batch", "seq_len", "model.d_model", "optim.peak_lr", "precision.compute", "stepsize"):
        assert not may_differ(name), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "--steps 0: give at least 1"),
        ({"log_every": -1}, "--log-every -1: give at least 1"),
        ({"seq_len": -1}, "--seq-len -1"),
        ({"seq_len": 17}, "--seq-len 17 is above the model's 16 positions"),
        ({"accumulate": 3}, "--global-batch 8 cannot be cut into --accumulate 3 .* --global-batch 9"),
        ({"seed": 2**32}, "--seed 4294967296"),
    ],
)
def test_values_that_make_no_run_are_refused(changes: dict, words: str):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(RUN, **changes)


def test_the_sequence_length_is_the_models_unless_given():
    assert RUN.sequence_length == 16
    assert dataclasses.replace(RUN, seq_len=5).sequence_length == 5
