"""The objective of distillation against PyTorch's losses on transformers' models, values and gradients, on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from meshgpt import trees
from meshgpt.config import Data, Run
from meshgpt.distributed.mesh import spec
from meshgpt.errors import UserError
from meshgpt.models.decoder import Head
from meshgpt.models.layers import Execution
from meshgpt.models.model import GPT2Config, GPTJConfig, Model, ModelConfig
from meshgpt.models.precision import Precision
from meshgpt.objectives.distillation import Distill, chosen_layers
from meshgpt.objectives.loss import NextToken, Teacher, summed
from meshgpt.optim.config import AdamW
from meshgpt.training.program import flops_per_token, training_flops
from meshgpt.training.step import from_params, make_train_step

DEEP = dataclasses.replace(tiny.GPT2, n_layers=4)
TOKENS = np.random.default_rng(3).integers(0, tiny.VOCAB, (8, 13), dtype=np.int32)
WEIGHTS = np.random.default_rng(4).integers(0, 2, (8, 12)).astype(np.float32)
MESHES = [(1, 1, 1), (2, 2, 2), (1, 4, 2)]


def objective(teacher: ModelConfig, **settings: float) -> Distill:
    return Distill(teacher="", teacher_model=teacher, **settings)


def ours(
    student: ModelConfig, wanted: Distill, mesh: tuple[int, int, int], dtype: str = "float32"
) -> tuple[float, dict[str, np.ndarray]]:
    """(mean loss, gradients by transformers' names) of random parameters."""
    with jax.set_mesh(tiny.mesh(*mesh)):
        model = Model(config=student, precision=Precision(compute=dtype))
        taught = dataclasses.replace(wanted, teacher_dtype="float32").teacher_for(model)
        frozen = {"teacher": tiny.params(taught.config, values_of(wanted.teacher_model))}
        loss = dataclasses.replace(wanted, teacher_dtype="float32").loss(model, frozen, None)

        def mean(params: trees.Tree, tokens: jax.Array, weights: jax.Array) -> jax.Array:
            total, counted = loss(params, tokens, weights, None)
            return total / counted.weight

        place = jax.sharding.PartitionSpec(("data", "fsdp"))
        tokens, weights = jax.device_put(TOKENS, place), jax.device_put(WEIGHTS, place)
        value, gradients = jax.jit(jax.value_and_grad(mean))(tiny.params(student), tokens, weights)
        return float(value), tiny.stored(student, tiny.to_numpy(gradients))


def values_of(teacher: ModelConfig) -> dict[str, np.ndarray]:
    """A teacher's parameters: not the student's, where the shapes are the same."""
    return {name: value[..., ::-1].copy() for name, value in tiny.numpy_params(teacher).items()}


def torchs(student: ModelConfig, wanted: Distill) -> tuple[float, dict[str, np.ndarray]]:
    """The same by transformers and PyTorch, as `Distiller.step` of DistilGPT2 has it."""
    pupil = tiny.torch_peer(student, tiny.numpy_params(student))
    teacher = tiny.torch_peer(wanted.teacher_model, values_of(wanted.teacher_model))
    tokens, counts = torch.tensor(TOKENS, dtype=torch.long), torch.tensor(WEIGHTS).reshape(-1)
    a = pupil(tokens[:, :-1], output_hidden_states=True)
    with torch.no_grad():
        b = teacher(tokens[:, :-1], output_hidden_states=True)
    chosen = counts.bool()
    s = a.logits.reshape(-1, tiny.VOCAB)[chosen]
    t = b.logits.reshape(-1, tiny.VOCAB)[chosen]
    heat = wanted.temperature
    soft = F.kl_div(F.log_softmax(s / heat, -1), F.softmax(t / heat, -1), reduction="batchmean") * heat**2
    hard = F.cross_entropy(s, tokens[:, 1:].reshape(-1)[chosen])
    total = wanted.alpha_ce * soft + wanted.alpha_mlm_or_clm * hard
    if wanted.alpha_cos:
        x, y = (out.hidden_states[-1].flatten(0, 1)[chosen] for out in (a, b))
        total = total + wanted.alpha_cos * F.cosine_embedding_loss(x, y, torch.ones(len(x)))
    total.backward()
    return total.item(), {name: leaf.grad.numpy() for name, leaf in pupil.named_parameters()}


@pytest.mark.parametrize("mesh", MESHES)
def test_the_published_losses_are_pytorchs_on_every_mesh(mesh: tuple[int, int, int]) -> None:
    wanted = objective(DEEP, chunk_tokens=7)
    compare(ours(tiny.GPT2, wanted, mesh), torchs(tiny.GPT2, wanted))


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha_ce": 1.0, "alpha_mlm_or_clm": 0.0, "alpha_cos": 0.0, "temperature": 1.0},
        {"alpha_ce": 0.0, "alpha_mlm_or_clm": 1.0, "alpha_cos": 3.0},
        {"temperature": 5.0, "alpha_ce": 0.5},
    ],
)
def test_each_loss_by_itself(settings: dict[str, float]) -> None:
    wanted = objective(DEEP, **settings)
    compare(ours(tiny.GPT2, wanted, (2, 2, 2)), torchs(tiny.GPT2, wanted))


def test_a_teacher_of_another_family_and_width() -> None:
    wanted = objective(tiny.GPTJ, alpha_cos=0.0)
    compare(ours(tiny.GPT2, wanted, (2, 2, 2)), torchs(tiny.GPT2, wanted))
    back = objective(tiny.GPT2, alpha_cos=0.0)
    compare(ours(tiny.GPTJ, back, (2, 2, 2)), torchs(tiny.GPTJ, back))


def compare(found: tuple[float, dict[str, np.ndarray]], expected: tuple[float, dict[str, np.ndarray]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=2e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        tiny.assert_close(found[1][name], gradient, 2e-4, name)


def test_in_bfloat16_it_is_near() -> None:
    wanted = objective(DEEP)
    value, gradients = ours(tiny.GPT2, wanted, (2, 2, 2), "bfloat16")
    exact, expected = ours(tiny.GPT2, wanted, (1, 1, 1))
    assert value == pytest.approx(exact, rel=0.02)
    a, b = (np.concatenate([g[name].ravel() for name in expected]) for g in (gradients, expected))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.98


def test_a_teacher_like_the_student_teaches_nothing() -> None:
    """Divergence and its gradient are 0, the cosine is 1: what is left is the text."""
    wanted = objective(tiny.GPT2, alpha_mlm_or_clm=0.0)
    with jax.set_mesh(tiny.mesh(2, 2, 2)):
        model = tiny.model(tiny.GPT2)
        params = tiny.params(tiny.GPT2)
        loss = wanted.loss(model, {"teacher": params}, None)
        place = jax.sharding.PartitionSpec(("data", "fsdp"))
        tokens, weights = jax.device_put(TOKENS, place), jax.device_put(np.ones((8, 12), np.float32), place)
        mean = jax.jit(jax.value_and_grad(lambda p, t, w: loss(p, t, w, None)[0] / 96))
        value, gradients = mean(params, tokens, weights)
        assert abs(float(value)) < 1e-5
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients)) < 1e-5


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_the_next_token_part_is_reported_apart_in_nats(mesh: tuple[int, int, int]) -> None:
    """`loss` is PyTorch's cross-entropy of the student alone, `objective` the whole, over one microbatch and two."""
    wanted = dataclasses.replace(objective(DEEP, chunk_tokens=7), teacher_dtype="float32")
    pupil = tiny.torch_peer(tiny.GPT2, tiny.numpy_params(tiny.GPT2))
    tokens = torch.tensor(TOKENS, dtype=torch.long)
    with torch.no_grad():
        logits = pupil(tokens[:, :-1]).logits.double()
    nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].reshape(-1), reduction="none").numpy()
    alone = float((nats * WEIGHTS.reshape(-1)).sum() / WEIGHTS.sum())
    whole = torchs(tiny.GPT2, wanted)[0]
    optim = AdamW(warmup_steps=0)
    with jax.set_mesh(tiny.mesh(*mesh)):
        model = tiny.model(tiny.GPT2)
        frozen = {"teacher": tiny.params(wanted.teacher_for(model).config, values_of(DEEP))}
        step = jax.jit(make_train_step(wanted.loss(model, frozen, None), optim, 3, None))
        for accumulate in (1, 2):
            split = [part.reshape(accumulate, -1, part.shape[1]) for part in (TOKENS, WEIGHTS)]
            placed = (jax.device_put(part, spec("_ batch _")) for part in split)
            _, metrics = step(from_params(tiny.params(tiny.GPT2), optim), *placed)
            assert float(metrics["loss"]) == pytest.approx(alone, rel=2e-5)
            assert float(metrics["objective"]) == pytest.approx(whole, rel=2e-5)


def test_a_teachers_forward_pass_counts() -> None:
    """Of the FLOPs that PyTorch counts in a student's training step beside a teacher; recomputation is not of them."""
    from torch.utils.flop_counter import FlopCounterMode

    wanted = objective(DEEP)
    run = Run(model=tiny.GPT2, data=Data(store="x"), objective=wanted, steps=1, global_batch=1, seq_len=12)
    pupil, teacher = (tiny.torch_peer(config, tiny.numpy_params(config)) for config in (tiny.GPT2, DEEP))
    for model in (pupil, teacher):
        model.set_attn_implementation("eager")
    tokens = torch.zeros((2, 12), dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            teacher(tokens)
        pupil(tokens).logits.sum().backward()
    assert flops_per_token(run) * tokens.numel() == counter.get_total_flops()
    again = dataclasses.replace(run, execution=Execution(remat="full"))
    assert flops_per_token(again) == flops_per_token(run)
    assert (
        flops_per_token(run) - flops_per_token(dataclasses.replace(run, objective=NextToken()))
        == training_flops(run).beside
    )


def test_logits_are_held_a_chunk_at_a_time() -> None:
    """The largest value of either vocabulary in the program is of one chunk, not of the batch."""
    rows, length, width, vocab = 4, 256, 16, 4096

    def loss(
        x: jax.Array, y: jax.Array, w: jax.Array, v: jax.Array, targets: jax.Array, weights: jax.Array
    ) -> jax.Array:
        beside = Teacher(y, Head(v, None, vocab))
        return summed(x, Head(w, None, vocab), targets, weights, objective(tiny.GPT2, chunk_tokens=32), beside)[0]

    with jax.set_mesh(tiny.mesh()):
        states = jnp.zeros((rows, length, width), out_sharding=spec("batch seq embed"))
        table = jnp.zeros((vocab, width), out_sharding=spec("vocab_fsdp embed"))
        weights = jnp.zeros((rows, length), out_sharding=spec("batch seq"))
        gradient = jax.make_jaxpr(jax.grad(loss, argnums=(0, 2)))
        jaxpr = str(gradient(states, states, table, table, weights.astype(jnp.int32), weights))
    assert f"f32[{rows},{32 // rows},{vocab}]" in jaxpr
    assert f"{length},{vocab}]" not in jaxpr


def test_layers_of_the_teacher_are_spread_evenly() -> None:
    twelve = objective(GPT2Config())
    assert chosen_layers(twelve, 6) == (0, 2, 4, 6, 8, 10)
    assert chosen_layers(twelve, 12) == tuple(range(12))
    published = objective(GPT2Config(), layers=(0, 2, 4, 7, 9, 11))
    assert chosen_layers(published, 6) == (0, 2, 4, 7, 9, 11)
    with pytest.raises(UserError, match=r"names 6 layers and the student has 5"):
        chosen_layers(published, 5)
    with pytest.raises(UserError, match=r"the teacher has layers 0 to 11"):
        chosen_layers(objective(GPT2Config(), layers=(0, 12)), 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"alpha_cos": -1.0}, "none may be negative"),
        ({"alpha_ce": 0.0, "alpha_mlm_or_clm": 0.0}, "one of the first two"),
        ({"chunk_tokens": 0}, "chunk_tokens=0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        objective(GPT2Config(), **settings)


def test_models_that_cannot_be_beside_each_other() -> None:
    student = Model(config=tiny.GPT2)
    with pytest.raises(UserError, match=r"hidden states have 32 numbers and the student's 16"):
        objective(tiny.GPTJ).teacher_for(student)
    with pytest.raises(UserError, match=r"the teacher has 8 positions and the student 16"):
        objective(dataclasses.replace(tiny.GPT2, n_positions=8)).teacher_for(student)


def test_a_larger_vocabulary_of_the_teacher_is_cut() -> None:
    student = Model(config=GPT2Config())
    taught = objective(GPTJConfig(), alpha_cos=0.0).teacher_for(student).config
    assert (taught.vocab_size, taught.padded_vocab) == (50257, 50304)
    larger = objective(GPT2Config(vocab_size=50000)).teacher_for(student).config
    assert (larger.vocab_size, larger.padded_vocab) == (50000, 50304)
