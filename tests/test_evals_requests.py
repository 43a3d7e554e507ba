"""Texts cut into requests as the harness cuts them."""

import eval_peers
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval import utils
from lm_eval.api.model import TemplateLM

from meshgpt.errors import UserError
from meshgpt.evals.requests import Request, pair_requests, windows

EOT = 0


class Encoder(TemplateLM):
    """The harness's own cutting, with our tokenizer."""

    eot_token_id = EOT

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return eval_peers.tokenizer().encode(string)

    def _loglikelihood_tokens(self, requests, **kwargs):
        raise NotImplementedError

    loglikelihood_rolling = generate_until = _loglikelihood_tokens


@given(st.lists(st.tuples(st.text("ab \n", max_size=6), st.text("ab c", min_size=1, max_size=6)), max_size=8))
def test_pairs_are_cut_as_by_the_harness(pairs: list[tuple[str, str]]) -> None:
    pairs = [(context, continuation) for context, continuation in pairs if context.strip()]
    expected = [Encoder()._encode_pair(*pair) for pair in pairs]
    found = pair_requests(eval_peers.tokenizer(), pairs)
    assert found == [Request(context + continuation, len(continuation)) for context, continuation in expected]


@pytest.mark.parametrize("context", ["", "  \n"])
def test_an_empty_context_is_the_end_of_text(context: str) -> None:
    tokenizer = eval_peers.tokenizer()
    (request,) = pair_requests(tokenizer, [(context, " the river")])
    scored = tokenizer.encode(context + " the river")
    assert request == Request([tokenizer.eot_id, *scored], len(scored))


@given(st.integers(0, 40), st.integers(1, 12), st.integers(0, 12))
def test_windows_are_those_of_the_harness(count: int, length: int, stride: int) -> None:
    tokens = list(range(1, count + 1))
    stride = min(stride, length)
    context = length - (stride or length) + 1
    rolling = utils.get_rolling_token_windows(tokens, EOT, length, context)
    expected = [Request(given + scored[-1:], len(scored)) for given, scored in rolling]
    found = list(windows(tokens, EOT, length, stride))
    assert found == expected
    assert [token for window in found for token in window.tokens[-window.scored :]] == tokens


def test_a_window_after_the_first_sees_at_least_length_minus_stride_tokens() -> None:
    given = [len(window.tokens) - window.scored for window in windows(range(100), EOT, 16, 4)]
    assert given[0] == 1
    assert min(given[1:]) >= 16 - 4


@pytest.mark.parametrize("stride", [-1, 9])
def test_a_stride_that_leaves_gaps_is_refused(stride: int) -> None:
    with pytest.raises(UserError, match=rf"--stride {stride}: give 1 to the model's context of 8 tokens"):
        list(windows([1, 2, 3], EOT, 8, stride))
