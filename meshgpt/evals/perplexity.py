"""Perplexity of texts, by token, by word and by byte.

Of documents with log-likelihood L = sum over their tokens of ln p(token | tokens before it), in nats:

    token perplexity  exp(-L / T)      T: tokens, as many as the tokenizer makes of the texts
    word perplexity   exp(-L / W)      W: words, `len(re.split(r"\\s+", text))`
    byte perplexity   exp(-L / B)      B: bytes of the texts as UTF-8
    bits per byte     -L / (B ln 2)    = log2(byte perplexity)

Token perplexities compare only between models with one tokenizer; the others between any two. Word and byte perplexity
and bits per byte are the lm-evaluation-harness's figures of those names (its task `wikitext`). Each document begins
anew, after the end-of-text token, whose own prediction is not counted; longer ones are read in windows
(`requests.windows`).
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from meshgpt.data.tokenizer import Tokenizer
from meshgpt.evals.intervals import Interval, ratio_interval
from meshgpt.evals.requests import windows
from meshgpt.evals.scoring import Progress, Scorer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """What was measured: `nats` is -L; see the module's docstring for the formulas."""

    nats: float
    tokens: int
    words: int
    bytes: int
    documents: int
    by_document: np.ndarray | None = None  # (documents, 4): nats, tokens, words and bytes of each
    lost: int = 0  # characters of the texts that the tokens do not hold, and that were not predicted

    @property
    def token_perplexity(self) -> float:
        """exp(-L / T)"""
        return _exp(self.nats / self.tokens)

    @property
    def word_perplexity(self) -> float:
        """exp(-L / W)"""
        return _exp(self.nats / self.words)

    @property
    def byte_perplexity(self) -> float:
        """exp(-L / B)"""
        return _exp(self.nats / self.bytes)

    @property
    def bits_per_byte(self) -> float:
        """-L / (B ln 2)"""
        return self.nats / self.bytes / math.log(2)

    def __float__(self) -> float:
        return self.token_perplexity

    def figures(self) -> dict[str, float]:
        """The four of them by name."""
        names = ("token_perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")
        return {name: getattr(self, name) for name in names}

    def intervals(self) -> dict[str, Interval | None]:
        """The 95% interval of each of `figures`, by resampling documents; None where there are too few to do so."""
        if self.by_document is None:
            return dict.fromkeys(self.figures())
        nats, tokens, words, sizes = self.by_document.T
        found = {"token_perplexity": tokens, "word_perplexity": words, "byte_perplexity": sizes}
        ranges: dict[str, Interval | None] = {}
        for name, counted in found.items():
            between = ratio_interval(nats, counted)
            ranges[name] = None if between is None else (_exp(between[0]), _exp(between[1]))
        bits = ratio_interval(nats, sizes * math.log(2))
        return ranges | {"bits_per_byte": bits}


def measure(
    scorer: Scorer,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    report: Progress,
    *,
    stride: int = 0,
    counted: Sequence[str] | None = None,
) -> Perplexity:
    """The perplexity of `texts`, each a document.

    Args:
      stride: tokens by which a window moves on, 0 for a whole window; see `requests.windows`.
      counted: the texts whose words and bytes are counted, where that is not what is scored: the harness scores
        WikiText with its spaces around punctuation removed, and counts the original.

    Raises:
      UserError: a stride that the context does not hold.
    """
    encoded = tokenizer.encode_batch([*texts])
    cut = [list(windows(tokens, tokenizer.prefix_id, scorer.context, stride)) for tokens in encoded]
    requests = [window for document in cut for window in document]
    scores = scorer.score(requests, report, "perplexity")
    counted = texts if counted is None else counted
    words = [len(re.split(r"\s+", text)) for text in counted]
    sizes = [len(text.encode()) for text in counted]
    left = iter(scores)
    nats = [-math.fsum(next(left).log_likelihood for _ in document) for document in cut]
    tokens = [sum(window.scored for window in document) for document in cut]
    return Perplexity(
        nats=-math.fsum(score.log_likelihood for score in scores),
        tokens=sum(tokens),
        words=sum(words),
        bytes=sum(sizes),
        documents=len(texts),
        lost=sum(tokenizer.loss(text, tokens).characters for text, tokens in zip(texts, encoded, strict=True)),
        by_document=np.array([nats, tokens, words, sizes], np.float64).T,
    )


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
