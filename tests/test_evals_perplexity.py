"""Perplexity by its formulas, beside PyTorch in float64."""

import math
from collections.abc import Iterator

import eval_peers
import jax
import numpy as np
import pytest
import tiny
import torch
from eval_peers import silent

from meshgpt.errors import UserError
from meshgpt.evals.perplexity import Perplexity, measure
from meshgpt.evals.scoring import Scorer
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.precision import Precision

CONFIG = GPT2Config(vocab_size=400, n_positions=16, n_layers=1, n_heads=2, d_model=16, vocab_multiple=64)
TEXTS = [eval_peers.sentence(1, 3), eval_peers.sentence(2, 40) + "\n\n two  spaces é ", eval_peers.sentence(3, 9)]


@pytest.fixture(scope="module", autouse=True)
def _quick_to_compile() -> Iterator[None]:
    with eval_peers.quick_to_compile():
        yield


@pytest.fixture
def scorer() -> Iterator[Scorer]:
    with jax.set_mesh(tiny.mesh()):
        yield Scorer(tiny.model(CONFIG, precision=Precision(compute="float32")), tiny.params(CONFIG), tiny.mesh())


def nats(stride: int) -> float:
    """-L, each token predicted from the window it lies in, one window at a time."""
    peer = tiny.torch_peer(CONFIG).double()
    tokenizer, length, total = eval_peers.tokenizer(), CONFIG.n_positions, 0.0
    for text in TEXTS:
        given = [tokenizer.eot_id, *tokenizer.encode(text)]
        done = 0
        while done < len(given) - 1:
            last = min(len(given) - 1, done + (stride if done else length))
            first = max(0, last - length)
            with torch.no_grad():
                rows = peer(torch.tensor([given[first:last]])).logits[0].log_softmax(-1)
            total -= sum(float(rows[i - 1 - first, given[i]]) for i in range(done + 1, last + 1))
            done = last
    return total


@pytest.mark.parametrize("stride", [0, 5, 16])
def test_each_figure_is_its_formula(scorer: Scorer, stride: int) -> None:
    tokenizer = eval_peers.tokenizer()
    found = measure(scorer, tokenizer, TEXTS, silent, stride=stride)
    loss = nats(stride or CONFIG.n_positions)
    tokens = sum(map(len, tokenizer.encode_batch(TEXTS)))
    size = sum(len(text.encode()) for text in TEXTS)
    words = 3 + 40 + 4 + 9  # "é " ends in a separator, which the formula counts one word after
    assert (found.tokens, found.words, found.bytes, found.documents) == (tokens, words, size, 3)
    assert found.nats == pytest.approx(loss, rel=1e-6)
    assert found.figures() == pytest.approx(
        {
            "token_perplexity": math.exp(loss / tokens),
            "word_perplexity": math.exp(loss / words),
            "byte_perplexity": math.exp(loss / size),
            "bits_per_byte": math.log2(math.e) * loss / size,
        },
        rel=1e-4,
    )
    assert math.log2(found.byte_perplexity) == pytest.approx(found.bits_per_byte)


def test_a_smaller_stride_gives_more_context_and_another_figure(scorer: Scorer) -> None:
    by_stride = {stride: measure(scorer, eval_peers.tokenizer(), TEXTS, silent, stride=stride) for stride in (1, 16)}
    assert by_stride[1].tokens == by_stride[16].tokens
    assert abs(by_stride[1].nats - by_stride[16].nats) > 1e-3


def test_a_document_begins_anew(scorer: Scorer) -> None:
    tokenizer = eval_peers.tokenizer()
    alone = [measure(scorer, tokenizer, [text], silent).nats for text in TEXTS]
    assert measure(scorer, tokenizer, TEXTS, silent).nats == pytest.approx(sum(alone), rel=1e-6)
    assert measure(scorer, tokenizer, TEXTS[::-1], silent).nats == pytest.approx(sum(alone), rel=1e-6)


def test_what_is_counted_may_be_another_text(scorer: Scorer) -> None:
    usual = measure(scorer, eval_peers.tokenizer(), ["a b"], silent)
    other = measure(scorer, eval_peers.tokenizer(), ["a b"], silent, counted=["a  b c é"])
    assert (usual.words, usual.bytes, other.words, other.bytes) == (2, 3, 4, 9)
    assert other.nats == usual.nats


def test_a_perplexity_beyond_floats_is_infinite() -> None:
    hopeless = Perplexity(nats=1e6, tokens=10, words=1, bytes=1, documents=1)
    assert hopeless.token_perplexity == np.inf
    assert hopeless.bits_per_byte == pytest.approx(1e6 / math.log(2))


def test_a_stride_beyond_the_context_is_refused(scorer: Scorer) -> None:
    with pytest.raises(UserError, match="--stride 17: give 1 to the model's context of 16 tokens"):
        measure(scorer, eval_peers.tokenizer(), TEXTS, silent, stride=17)
