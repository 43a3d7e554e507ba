"""Log-likelihoods beside PyTorch's in float64, on any mesh and in any batch."""

from collections.abc import Iterator

import eval_peers
import jax
import numpy as np
import pytest
import tiny
import torch
from eval_peers import silent

from meshgpt.errors import UserError
from meshgpt.evals import scoring
from meshgpt.evals.requests import Request
from meshgpt.evals.scoring import Scorer, batches, padded
from meshgpt.models.model import ModelConfig
from meshgpt.models.precision import Precision

# Of every length that fits, with 1 to all tokens scored; the last but one is too long, the last scores nothing.
REQUESTS = [Request(tiny.tokens(1, 2 + n % 16, seed=n)[0].tolist(), 1 + n % (1 + n % 16)) for n in range(40)]
REQUESTS += [Request(tiny.tokens(1, 30, seed=99)[0].tolist(), 5), Request([5, 6], 0)]


@pytest.fixture(scope="module", autouse=True)
def _quick_to_compile() -> Iterator[None]:
    with eval_peers.quick_to_compile():
        yield


def scorer(config: ModelConfig, mesh: jax.sharding.Mesh, batch_size: int = 0) -> Scorer:
    return Scorer(tiny.model(config, precision=Precision(compute="float32")), tiny.params(config), mesh, batch_size)


def expected(config: ModelConfig, requests: list[Request]) -> list[tuple[float, bool]]:
    """By transformers, each request alone, in float64."""
    peer = tiny.torch_peer(config).double()
    found = []
    for request in requests:
        tokens = request.tokens[-(config.n_positions + 1) :]
        with torch.no_grad():
            nats = peer(torch.tensor([tokens[:-1]])).logits.log_softmax(-1)[0, -request.scored :]
        targets = torch.tensor(tokens[-request.scored :])
        greedy = bool((nats.argmax(-1) == targets).all())
        found.append((float(nats.gather(1, targets[:, None]).sum()) if request.scored else 0.0, greedy))
    return found


@pytest.mark.parametrize(
    ("config", "mesh"),
    [(tiny.GPT2, (1, 1, 1)), (tiny.GPT2, (2, 2, 2)), (tiny.GPTJ, (1, 4, 2))],
    ids=["gpt2", "gpt2 on a mesh", "gptj on a mesh"],
)
def test_scores_equal_transformers_on_any_mesh(config: ModelConfig, mesh: tuple[int, int, int]) -> None:
    with jax.set_mesh(tiny.mesh(*mesh)):
        made = scorer(config, tiny.mesh(*mesh))
        ours = made.score(REQUESTS, silent)
    theirs = expected(config, REQUESTS[:-1])
    np.testing.assert_allclose([score.log_likelihood for score in ours[:-1]], [nats for nats, _ in theirs], rtol=1e-5)
    assert [score.greedy for score in ours[:-1]] == [greedy for _, greedy in theirs]
    assert (ours[-1].log_likelihood, ours[-1].greedy) == (0.0, True)
    assert made.truncated == 1


def test_what_is_likeliest_at_each_token_is_greedy() -> None:
    config = tiny.GPT2
    peer = tiny.torch_peer(config)
    text = [3]
    for _ in range(8):
        text.append(int(peer(torch.tensor([text])).logits[0, -1].argmax()))
    other = [*text[:-3], text[-3] + 1, *text[-2:]]
    with jax.set_mesh(tiny.mesh()):
        first, second, third = scorer(config, tiny.mesh()).score(
            [Request(text, 8), Request(other, 4), Request(other, 3)], silent
        )
    assert first.greedy
    assert not second.greedy
    assert not third.greedy


def test_scores_depend_neither_on_the_order_nor_on_the_batch() -> None:
    with jax.set_mesh(tiny.mesh()):
        ours = scorer(tiny.GPT2, tiny.mesh()).score(REQUESTS, silent)
        other = scorer(tiny.GPT2, tiny.mesh(), batch_size=3).score(REQUESTS[::-1], silent)[::-1]
    np.testing.assert_allclose([a.log_likelihood for a in ours], [b.log_likelihood for b in other], rtol=1e-6)


def test_batches_follow_from_the_contents_alone_so_that_processes_agree() -> None:
    def contents(requests: list[Request]) -> list[list[Request]]:
        order = scoring._longest_first(requests)
        return [[requests[i] for i in batch.indices] for batch in batches(order, requests, 16, lambda given: 4)]

    assert contents(REQUESTS) == contents(REQUESTS[::-1])


def test_few_programs_are_compiled() -> None:
    before = scoring._scores._cache_size()
    with jax.set_mesh(tiny.mesh()):
        made = scorer(tiny.GPT2, tiny.mesh(), batch_size=5)
        made.score(REQUESTS, silent)
        made.score(REQUESTS[:7], silent)
    assert 0 < scoring._scores._cache_size() - before <= 2  # 16 given, and 8 or 16 scored


def test_every_batch_is_a_multiple_of_the_meshs_shards_and_holds_its_rows() -> None:
    rng = np.random.default_rng(0)
    requests = [Request([0] * int(n), min(int(n) - 1, 9)) for n in rng.integers(2, 1000, 300)]
    order = scoring._longest_first(requests)
    cut = list(batches(order, requests, 1024, lambda given: max(1, 4096 // given)))
    assert sorted(index for batch in cut for index in batch.indices) == list(range(300))
    for batch in cut:
        assert len(batch.indices) <= batch.rows
        assert max(len(requests[i].tokens) - 1 for i in batch.indices) <= batch.given
        assert max(requests[i].scored for i in batch.indices) <= batch.scored <= batch.given
    assert len({(batch.rows, batch.given, batch.scored) for batch in cut}) <= 12
    with jax.set_mesh(tiny.mesh(2, 2, 2)):
        assert scorer(tiny.GPT2, tiny.mesh(2, 2, 2), batch_size=5).rows(16) == 8
        assert scorer(tiny.GPT2, tiny.mesh(2, 2, 2)).rows(10**9) == 4


def test_padded_lengths_are_few() -> None:
    assert sorted({padded(n, 32, 1024) for n in range(1, 1025)}) == [32, 64, 128, 256, 384, 512, 768, 1024]
    assert all(n <= padded(n, 32, 1000) <= 1000 for n in range(1, 1001))


def test_progress_reaches_the_end() -> None:
    said = []
    with jax.set_mesh(tiny.mesh()):
        made = scorer(tiny.GPT2, tiny.mesh(), batch_size=16)
        made.score(REQUESTS[:40], lambda label, done, total: said.append((label, done, total)), "x")
    assert said == [("x", 16, 40), ("x", 32, 40), ("x", 40, 40)]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([1] * 18, 17), "a continuation has 17 tokens, and the model's context is 16"),
        (Request([1, 97], 1), "token id 97, and the model knows 0 to 96"),
    ],
)
def test_what_cannot_be_scored_is_refused(request_: Request, message: str) -> None:
    with jax.set_mesh(tiny.mesh()), pytest.raises(UserError, match=message):
        scorer(tiny.GPT2, tiny.mesh()).score([request_], silent)


def test_a_negative_batch_is_refused() -> None:
    with jax.set_mesh(tiny.mesh()), pytest.raises(UserError, match="--batch-size -1"):
        scorer(tiny.GPT2, tiny.mesh(), batch_size=-1)
