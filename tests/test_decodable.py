"""Only ids that the tokenizer can decode are drawn, whatever the model has; no other is dropped in silence."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import sentencepiece
import tiny
import tokenizers
import torch

from meshgpt.data.tokenizer import Tokenizer, load_tokenizer, train_bpe, train_sentencepiece
from meshgpt.distributed.mesh import spec
from meshgpt.errors import UserError
from meshgpt.evals.lm import Answers
from meshgpt.evals.requests import pair_requests
from meshgpt.evals.scoring import Scorer
from meshgpt.inference import generate as module
from meshgpt.inference.generate import Generator, generate_text
from meshgpt.inference.sampling import Sampling, drawable
from meshgpt.models.model import ModelConfig

TEXTS = ["def decode(self, ids):\n    return self.text[ids]\n# naïve 日本, 1,234 words of it\n"] * 20
FAMILIES = [dataclasses.replace(config, n_positions=48) for config in tiny.FAMILIES]
BOTH = pytest.mark.parametrize("config", FAMILIES, ids=tiny.name)
MESHES = pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2), (1, 1, 8)], ids=str)
PROMPTS = [tiny.tokens(1, length, seed=length)[0].tolist() for length in (3, 17, 1)]
# Holes as a vocabulary has them, and an end as where a model has more ids than its tokenizer.
DECODABLE = np.random.default_rng(0).random(tiny.VOCAB - 20) < 0.5
HIDDEN = [i for i in range(tiny.VOCAB) if i >= len(DECODABLE) or not DECODABLE[i]]


def with_holes(folder: Path) -> Tokenizer:
    """A byte-level BPE whose last piece has an id beyond a hole of 9."""
    train_bpe(TEXTS, 300).save(folder)
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text())
    vocab = described["model"]["vocab"]
    described["model"]["vocab"] = {piece: i + 9 * (i == max(vocab.values())) for piece, i in vocab.items()}
    file.write_text(json.dumps(described))
    return load_tokenizer(folder)


def silent(label: str, done: int, total: int | None) -> None:
    del label, done, total


def test_a_byte_level_bpe_says_which_ids_its_library_knows(tmp_path: Path) -> None:
    ours = with_holes(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    known = [theirs.id_to_token(i) is not None for i in range(ours.vocab_size)]
    assert ours.decodable.tolist() == known
    assert known.count(False) == 9
    assert theirs.decode([known.index(False)]) == ""  # what was passed on in silence
    for ids in ([known.index(False)], [5, ours.vocab_size], [-1], [2**40]):
        with pytest.raises(
            UserError, match=rf"token id {ids[-1]} stands for no text: the tokenizer has 300 ids, from 0"
        ):
            ours.decode(ids)
    for text in TEXTS:
        assert ours.decode(ours.encode(text)) == text
        assert ours.decode(np.array(ours.encode(text), np.uint16)) == text


def test_sentencepiece_writes_out_every_control_symbol_and_refuses_what_it_has_not() -> None:
    ours = train_sentencepiece(TEXTS, 350)
    assert ours.decodable.all()
    assert len(ours.decodable) == 350
    for ids in ([350], [5, 511], [-1]):
        with pytest.raises(UserError, match=rf"token id {ids[-1]} stands for no text: the tokenizer has 350 ids"):
            ours.decode(ids)


def test_no_id_of_a_published_kind_of_sentencepiece_model_vanishes(tmp_path: Path) -> None:
    """With <s>, </s> and <pad>, as T5's and Llama's have them."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "spm"), vocab_size=60, model_type="unigram",
        pad_id=3, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    ours = load_tokenizer(tmp_path / "spm.model")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    assert theirs.decode([1, 3]) == ""
    a, b = ours.encode("ids"), ours.encode("words")
    assert ours.decode([1, *a, 3, *b, 2]) == "<s>ids<pad>words</s>"
    assert all(ours.decode([i]) for i in range(ours.vocab_size) if theirs.id_to_piece(i) != "\u2581")


def test_what_may_be_drawn() -> None:
    assert drawable(None, 97, 128) is None
    assert drawable(np.ones(97, np.bool_), 97, 128) is None
    assert drawable(np.ones(200, np.bool_), 97, 128) is None
    allowed = drawable(np.array([True, False, True]), 5, 8)
    assert allowed is not None
    assert allowed.tolist() == [True, False, True, False, False, False, False, False]


@BOTH
def test_greedy_equals_transformers_with_the_others_suppressed(config: ModelConfig) -> None:
    peer = tiny.torch_peer(config)
    with jax.set_mesh(tiny.mesh()):
        sampling = Sampling(max_new_tokens=20, temperature=0)
        found = Generator(tiny.model(config), tiny.params(config)).generate(PROMPTS, sampling, decodable=DECODABLE)
    for prompt, (ours,) in zip(PROMPTS, found, strict=True):
        row = torch.tensor([prompt])
        settings = {"do_sample": False, "max_new_tokens": len(ours), "eos_token_id": None, "pad_token_id": 0}
        theirs = peer.generate(row, attention_mask=torch.ones_like(row), suppress_tokens=HIDDEN, **settings)
        assert theirs[0, len(prompt) :].tolist() == ours


@MESHES
def test_no_other_id_is_drawn_first_or_from_the_cache(mesh: tuple[int, int, int]) -> None:
    config = FAMILIES[1]
    with jax.set_mesh(tiny.mesh(*mesh)):
        one = Generator(tiny.model(config), tiny.params(config))
        for settings in ({"temperature": 0.0}, {"temperature": 9.0}, {"top_k": 3}, {"top_p": 0.9, "top_k": 90}):
            sampling = Sampling(**({"max_new_tokens": 25, "samples": 4} | settings))
            found = one.generate(PROMPTS, sampling, decodable=DECODABLE)
            drawn = {token for samples in found for sample in samples for token in sample}
            assert not drawn & set(HIDDEN), settings
        assert {token for (sample,) in one.generate(PROMPTS, Sampling()) for token in sample} & set(HIDDEN)


def test_the_program_and_its_draws_stay_where_every_id_is_decodable() -> None:
    config = FAMILIES[0]
    sampling = Sampling(max_new_tokens=12, temperature=0.9, top_k=50, samples=2)
    with jax.set_mesh(tiny.mesh(2, 2, 2)):
        one = Generator(tiny.model(config), tiny.params(config))
        before = one.generate(PROMPTS, sampling)
        compiled = module._prefill._cache_size(), module._decode._cache_size()
        assert one.generate(PROMPTS, sampling, decodable=np.ones(tiny.VOCAB, np.bool_)) == before
        assert (module._prefill._cache_size(), module._decode._cache_size()) == compiled


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe", "bpe with holes"])
def test_text_from_a_model_with_more_ids_than_its_tokenizer(kind: str, tmp_path: Path) -> None:
    tokenizer = {
        "sentencepiece": lambda: train_sentencepiece(TEXTS, 350),
        "bpe": lambda: train_bpe(TEXTS, 300),
        "bpe with holes": lambda: with_holes(tmp_path),
    }[kind]()
    config = dataclasses.replace(tiny.GPTJ, vocab_size=512)
    with jax.set_mesh(tiny.mesh(1, 2, 2)):
        params = tiny.params(config)
        for temperature in (0.0, 50.0):
            sampling = Sampling(max_new_tokens=14, temperature=temperature, samples=8)
            (texts,) = generate_text(tiny.model(config), params, tokenizer, ["d"], sampling)
            assert all(texts)


@MESHES
def test_greedy_of_the_harness_is_the_likeliest_of_what_can_be_decoded(
    mesh: tuple[int, int, int], tmp_path: Path
) -> None:
    """Against float64 in NumPy; log-likelihoods are over all ids of the model, as before."""
    tokenizer = with_holes(tmp_path)
    config = dataclasses.replace(tiny.GPT2, vocab_size=512, n_positions=48)
    values = {name: value.copy() for name, value in tiny.numpy_params(config).items()}
    pairs = [("def decode", "(self, ids):\n"), ("self", ".text[ids]"), ("", "return")]
    with jax.set_mesh(tiny.mesh()):
        (draft,) = Generator(tiny.model(config), tiny.params(config, values)).generate(
            [tokenizer.encode("def decode")], Sampling(max_new_tokens=1, temperature=0),
            decodable=tokenizer.decodable,
        )  # fmt: skip
    pairs.append(("def decode", tokenizer.decode(draft[0])))
    values["wte_VD"][511] = 2 * values["wte_VD"][draft[0][0]]  # now the likeliest of all, and it stands for no text
    requests = pair_requests(tokenizer, pairs)

    @jax.jit
    def all_logits(params, tokens_BT):
        decoder = tiny.model(config).bind(params)
        return jax.sharding.reshard(decoder.logits(decoder.hidden(tokens_BT)), spec("_ _ _"))

    expected, plain = [], []
    with jax.set_mesh(tiny.mesh()):
        for request in requests:
            row = np.array([request.tokens[:-1]], np.int32)
            logits = np.asarray(all_logits(tiny.params(config, values), row), np.float64)[0, -request.scored :, :512]
            targets = np.array(request.tokens[-request.scored :])
            nats = logits[np.arange(len(targets)), targets] - np.log(np.exp(logits).sum(-1))
            plain.append(bool((logits.argmax(-1) == targets).all()))
            logits[:, [i for i in range(512) if i >= tokenizer.vocab_size or not tokenizer.decodable[i]]] = -np.inf
            expected.append((nats.sum(), bool((logits.argmax(-1) == targets).all())))
    assert [greedy for _, greedy in expected] != plain  # the likeliest of all ids is one that stands for no text
    with jax.set_mesh(tiny.mesh(*mesh)):
        scorer = Scorer(tiny.model(config), tiny.params(config, values), tiny.mesh(*mesh))
        found = Answers(scorer, tokenizer, silent).loglikelihood(pairs)
    for (ours, our_greedy), (theirs, greedy) in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
        assert our_greedy == greedy
