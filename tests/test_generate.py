"""Generation against the forward pass without a cache, and against transformers."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
import torch

from meshgpt.data.tokenizer import train_bpe
from meshgpt.distributed.mesh import spec
from meshgpt.errors import UserError
from meshgpt.inference import generate as module
from meshgpt.inference.generate import Generator, generate, generate_text
from meshgpt.inference.sampling import Sampling
from meshgpt.models.model import ModelConfig
from meshgpt.models.precision import Precision

FAMILIES = [dataclasses.replace(config, n_positions=80) for config in tiny.FAMILIES]
BOTH = pytest.mark.parametrize("config", FAMILIES, ids=tiny.name)
MESHES = pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2), (1, 1, 8)], ids=str)
# Ragged, one of a single token, and one that soon fills the context.
PROMPTS = [tiny.tokens(1, length, seed=length)[0].tolist() for length in (3, 17, 1, 71)]
GREEDY = Sampling(max_new_tokens=40, temperature=0, samples=2)


def generator(config: ModelConfig) -> Generator:
    return Generator(tiny.model(config), tiny.params(config))


def uncached_argmax(config: ModelConfig, texts: list[list[int]]) -> np.ndarray:
    """The likeliest next token after every token of each text, by the forward pass of training."""
    tokens_BT = np.zeros((-(-len(texts) // 4) * 4, config.n_positions), np.int32)
    for row, text in enumerate(texts):
        tokens_BT[row, : len(text)] = text

    @jax.jit
    def likeliest(params, tokens_BT: jax.Array) -> jax.Array:
        decoder = tiny.model(config).bind(params)
        return jax.sharding.reshard(decoder.logits(decoder.hidden(tokens_BT)), spec("batch _ _")).argmax(-1)

    return np.asarray(likeliest(tiny.params(config), jax.device_put(tokens_BT, spec("batch _"))))


def assert_likeliest(config: ModelConfig, prompts: list[list[int]], found: list[list[list[int]]]) -> None:
    """Every new token is the forward pass's own choice."""
    texts = [prompt + samples[0] for prompt, samples in zip(prompts, found, strict=True)]
    likeliest = uncached_argmax(config, texts)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        assert text[len(prompt) :] == likeliest[row, len(prompt) - 1 : len(text) - 1].tolist(), row


@BOTH
@MESHES
def test_greedy_equals_the_forward_pass_without_a_cache(config, mesh) -> None:
    with jax.set_mesh(tiny.mesh(*mesh)):
        found = generator(config).generate(PROMPTS, GREEDY)
        assert [len(samples[0]) for samples in found] == [40, 40, 40, 9]
        assert all(samples[0] == samples[1] for samples in found)
        assert_likeliest(config, PROMPTS, found)


def test_the_cache_grows_on_the_way(monkeypatch) -> None:
    monkeypatch.setattr(module, "_FIRST_SLOTS", 16)
    grown = []
    grow = module._grow
    monkeypatch.setattr(module, "_grow", lambda state, slots: grown.append(slots) or grow(state, slots))
    with jax.set_mesh(tiny.mesh()):
        assert_likeliest(FAMILIES[1], PROMPTS[:3], generator(FAMILIES[1]).generate(PROMPTS[:3], GREEDY))
    assert grown == [64]


@BOTH
def test_greedy_equals_transformers(config) -> None:
    peer = tiny.torch_peer(config)
    with jax.set_mesh(tiny.mesh()):
        found = generator(config).generate(PROMPTS, GREEDY)
    for prompt, (ours, _) in zip(PROMPTS, found, strict=True):
        row = torch.tensor([prompt])
        settings = {"do_sample": False, "max_new_tokens": len(ours), "eos_token_id": None, "pad_token_id": 0}
        theirs = peer.generate(row, attention_mask=torch.ones_like(row), **settings)
        assert theirs[0, len(prompt) :].tolist() == ours


def test_samples_do_not_depend_on_mesh_or_batch() -> None:
    config = FAMILIES[0]
    sampling = Sampling(max_new_tokens=9, temperature=0.8, top_k=40, top_p=0.95, seed=3, samples=2)
    found = []
    for mesh in ((1, 1, 1), (2, 2, 2)):
        with jax.set_mesh(tiny.mesh(*mesh)):
            found.append(generator(config).generate(PROMPTS, sampling))
    assert found[0] == found[1]
    assert len({tuple(sample) for samples in found[0] for sample in samples}) == 8  # all of them different
    with jax.set_mesh(tiny.mesh()):
        one = generator(config)

        def first(**changes: float) -> list[int]:
            return one.generate(PROMPTS[:1], dataclasses.replace(sampling, samples=1, **changes))[0][0]

        assert first() == found[0][0][0]
        assert first(max_new_tokens=12)[:9] == first()
        assert first(seed=4) != first()


def test_stops_at_the_end_of_text_which_is_cut_off() -> None:
    with jax.set_mesh(tiny.mesh()):
        one = generator(FAMILIES[1])
        free = [samples[0] for samples in one.generate(PROMPTS, GREEDY)]
        eot = free[0][5]
        ended = [samples[0] for samples in one.generate(PROMPTS, GREEDY, stop_ids={eot}, begin_id=eot)]
        assert ended == [tokens[: tokens.index(eot)] if eot in tokens else tokens for tokens in free]
        assert len(ended[0]) <= 5
        first = free[0][0]
        empty, same, at_once, _ = one.generate([[], [first], *PROMPTS[::3]], GREEDY, stop_ids={first}, begin_id=first)
        assert empty == same
        assert at_once == [[], []]


def test_a_row_that_has_enough_ends_early_and_no_other_does() -> None:
    long = dataclasses.replace(GREEDY, max_new_tokens=70, samples=1)
    with jax.set_mesh(tiny.mesh(2, 1, 2)):
        made = generator(FAMILIES[0])
        whole = [samples[0] for samples in made.generate(PROMPTS[:3], long)]
        assert len(set(map(tuple, whole))) == 3
        cut = made.generate(PROMPTS[:3], long, enough=lambda tokens: tokens[:20] == whole[0][:20])
    assert [len(row[0]) for row in cut] == [1 + module.CHUNK, 63, 70]
    assert all(row[0] == full[: len(row[0])] for row, full in zip(cut, whole, strict=True))


def test_few_programs_are_compiled_and_the_cache_is_not_copied() -> None:
    config = FAMILIES[0]
    with jax.set_mesh(tiny.mesh()):
        one = generator(config)
        one.generate([[5] * 2], Sampling(max_new_tokens=4))
        before = module._prefill._cache_size(), module._decode._cache_size()
        for length, sampling in ((1, Sampling(temperature=0)), (11, Sampling(temperature=0.3, top_k=9, seed=8))):
            one.generate([[5] * length], dataclasses.replace(sampling, max_new_tokens=4), stop_ids={7}, begin_id=7)
        assert (module._prefill._cache_size(), module._decode._cache_size()) == before

        sampling = dataclasses.replace(GREEDY, samples=1)
        rows, done_R = module._rows([[1]], sampling, config.n_positions, 1, ())
        tokens_PT, lengths_P = module._padded([[1]], 16, 1)
        knobs = module.Knobs.of(sampling)
        _, state = module._prefill(one._ready, tokens_PT, lengths_P, rows, done_R, knobs, 16)
        module._decode(one._ready, rows, knobs, state, np.int32(1))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.caches))


def test_matrices_are_held_in_the_compute_dtype_and_norms_are_not() -> None:
    model = tiny.model(FAMILIES[0], precision=Precision(compute="bfloat16"))
    with jax.set_mesh(tiny.mesh(1, 2, 2)):
        ready = Generator(model, tiny.params(FAMILIES[0]))._ready
        assert ready.blocks[1].mlp.up_DF.dtype == "bfloat16"
        assert ready.blocks[1].mlp.up_DF.sharding.spec == spec("_ mlp")
        assert ready.blocks[1].ln_1.scale_D.dtype == "float32"
        assert len(ready.blocks) == 2
        assert not jax.tree.leaves(ready.decoder.blocks)
    with jax.set_mesh(tiny.mesh()):
        found = generate(model, tiny.params(FAMILIES[0]), [[5, 2]], Sampling(max_new_tokens=7))
    assert len(found[0][0]) == 7


def test_text() -> None:
    tokenizer = train_bpe(["a few words, and a few more of these words"] * 3, 300)
    config = dataclasses.replace(FAMILIES[0], vocab_size=tokenizer.vocab_size)
    with jax.set_mesh(tiny.mesh()):
        params = tiny.params(config)
        texts = generate_text(tiny.model(config), params, tokenizer, ["a few", ""], Sampling(max_new_tokens=5))
        prompts = [tokenizer.encode("a few"), [tokenizer.eot_id]]
        ids = generate(
            tiny.model(config),
            params,
            prompts,
            Sampling(max_new_tokens=5),
            stop_ids={tokenizer.eot_id},
            begin_id=tokenizer.eot_id,
        )
    assert texts == [[tokenizer.decode(ids[0][0])], [tokenizer.decode(ids[1][0])]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there is no prompt"),
        ([[1], []], "prompt 1 is empty and there is no id that texts begin with"),
        ([[1], [5, 97]], "prompt 1 has the token id 97, and the model knows 0 to 96"),
        ([[-1]], "the token id -1"),
        ([[1] * 80], "prompt 0 has 80 tokens, and the model's context is 80: cut it to at most 79"),
    ],
)
def test_refuses(prompts, message) -> None:
    with jax.set_mesh(tiny.mesh()):
        one = generator(FAMILIES[0])
        with pytest.raises(UserError, match=message):
            one.generate(prompts, GREEDY)
