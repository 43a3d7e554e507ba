"""Texts as what can be scored: contexts with continuations, and windows over documents longer than the context.

Both are cut as the lm-evaluation-harness cuts them (lm_eval 0.4.13: `TemplateLM._encode_pair`,
`utils.get_rolling_token_windows`), so that figures are comparable.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from meshgpt.data.tokenizer import Tokenizer
from meshgpt.errors import UserError


@dataclasses.dataclass(frozen=True)
class Request:
    """Token ids, of which the last `scored` are predicted, each from all before it; at least one is only given."""

    tokens: list[int]
    scored: int


def pair_requests(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Request]:
    """One request for each (context, continuation), the continuation to be scored.

    Spaces at the end of a context count as the beginning of the continuation. The continuation's tokens are those of
    the whole text without as many as the context has alone. An empty context is the token that begins a text.
    """
    moved = [_without_trailing_space(context, continuation) for context, continuation in pairs]
    contexts = list(dict.fromkeys(context for context, _ in moved))
    encoded = dict(zip(contexts, tokenizer.encode_batch(contexts), strict=True))
    whole = tokenizer.encode_batch([context + continuation for context, continuation in moved])
    requests = []
    for (context, _), tokens in zip(moved, whole, strict=True):
        given = encoded[context]
        rest = tokens[len(given) :]
        requests.append(Request((given if context else [tokenizer.prefix_id]) + rest, len(rest)))
    return requests


def _without_trailing_space(context: str, continuation: str) -> tuple[str, str]:
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation


def windows(tokens: Sequence[int], before: int, length: int, stride: int = 0) -> Iterator[Request]:
    """Requests of at most `length` given tokens that together score each of `tokens` once.

    The first window scores up to `length` tokens, of which the first is predicted from the token `before`; every other
    one the next `stride`, the last what is left. All but the first are given as many tokens before these as fit.

    Args:
      stride: 0 is `length`, what the harness calls rolling: windows side by side, the last one moved back so that it is
        full. A smaller one costs length / stride times as much, and gives each token at least length - stride others.
    """
    stride = stride or length
    if not 0 < stride <= length:
        raise UserError(f"--stride {stride}: give 1 to the model's context of {length} tokens")
    given = [before, *tokens]
    done = min(length, len(tokens))
    if done:
        yield Request(given[: done + 1], done)
    while done < len(tokens):
        scored = min(stride, len(tokens) - done)
        done += scored
        yield Request(given[max(0, done - length) : done + 1], scored)
