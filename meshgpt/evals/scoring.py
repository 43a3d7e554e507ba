"""Log-likelihoods of token sequences: batches of like length, one compiled program for each of a few shapes, any mesh.

Legend: B rows of a batch over all devices, r this process's, T given tokens (padded), C scored tokens (padded),
D d_model.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from meshgpt.distributed import stopping
from meshgpt.distributed.batch import Feed, fetch
from meshgpt.distributed.mesh import batch_shards, spec
from meshgpt.errors import UserError
from meshgpt.evals.requests import Request
from meshgpt.inference.sampling import drawable
from meshgpt.models.layers import Execution
from meshgpt.models.model import Model, ModelConfig
from meshgpt.objectives.loss import token_log_likelihoods
from meshgpt.trees import Tree

# report(label, done, total): how far something is.
Progress = Callable[[str, int, int | None], None]

_SHORTEST, _FEWEST = 32, 8  # padded lengths begin here: of given, of scored tokens
# Given tokens of a device's part of a batch, where the number of rows is not asked for.
_TOKENS = {"cpu": 2048}
_TOKENS_ELSEWHERE = 16384


class Score(NamedTuple):
    """log_likelihood: sum of ln p over the scored tokens, in nats. greedy: whether each of them is the likeliest."""

    log_likelihood: float
    greedy: bool


class Batch(NamedTuple):
    """Indices of the requests in one batch, its rows with the padding, and its padded lengths."""

    indices: list[int]
    rows: int
    given: int
    scored: int


class Scorer:
    """A model that scores requests. Needs the mesh set that its parameters are on.

    Every process gives the same requests, in any order, and gets all scores.

    Attributes:
        truncated: how many requests had more tokens than fit, and lost the first of them.
    """

    def __init__(self, model: Model, params: Tree, mesh: Mesh, batch_size: int = 0) -> None:
        """batch_size: rows of a batch, over all devices; 0 chooses by length."""
        if batch_size < 0:
            raise UserError(f"--batch-size {batch_size}: give a number of sequences, or 0 to choose by length")
        # How a run was executed is no part of what it learned, and need not be possible here.
        self.model = dataclasses.replace(model, execution=Execution())
        self.params, self.batch_size, self.truncated = params, batch_size, 0
        self._mesh = mesh
        self._feeds: dict[int, Feed] = {}

    @property
    def context(self) -> int:
        """Tokens that the model can be given."""
        return self.model.config.n_positions

    def score(
        self,
        requests: Sequence[Request],
        report: Progress,
        label: str = "scoring",
        *,
        decodable: np.ndarray | None = None,
    ) -> list[Score]:
        """The score of each request; one without scored tokens has the log-likelihood 0.

        Args:
          decodable: the tokenizer's: greedy decoding draws no other id, where the model has more. None is all.

        Raises:
          UserError: a request that scores more tokens than the model's context, or has ids it does not know.
        """
        check_fits(requests, self.model.config)
        allowed_V = drawable(decodable, self.model.config.vocab_size, self.model.config.padded_vocab)
        fitted = [self._fitted(request) for request in requests]
        found = [Score(0.0, True)] * len(requests)
        pending: tuple[Batch, tuple[jax.Array, jax.Array]] | None = None
        done = 0

        def collect() -> None:
            nonlocal done
            if pending is None:
                return
            logprob_B, greedy_B = (fetch(out) for out in pending[1])
            for row, index in enumerate(pending[0].indices):
                found[index] = Score(float(logprob_B[row]), bool(greedy_B[row]))
            done += len(pending[0].indices)
            report(label, done, total)

        order = _longest_first(fitted)
        total = len(order)
        for batch in batches(order, fitted, self.context, self.rows):
            stopping.check()
            dispatched = self._dispatch([fitted[index] for index in batch.indices], batch, allowed_V)
            collect()
            pending = batch, dispatched
        collect()
        return found

    def rows(self, given: int) -> int:
        """Rows of a batch of `given` tokens each: a multiple of the mesh's batch shards."""
        shards = batch_shards()
        if self.batch_size:
            return -(-self.batch_size // shards) * shards
        return shards * max(1, _TOKENS.get(jax.default_backend(), _TOKENS_ELSEWHERE) // given)

    def _fitted(self, request: Request) -> Request:
        """The request without the first tokens, where it has more than fit."""
        if len(request.tokens) - 1 > self.context:
            self.truncated += 1
        return Request(request.tokens[-(self.context + 1) :], request.scored)

    def _dispatch(
        self, requests: list[Request], batch: Batch, allowed_V: np.ndarray | None
    ) -> tuple[jax.Array, jax.Array]:
        feed = self._feeds.setdefault(batch.rows, Feed(self._mesh, 1, batch.rows))
        tokens_rT = np.zeros((len(feed.rows), batch.given), np.int32)
        first_r1 = np.zeros((len(feed.rows), 1), np.int32)
        targets_rC = np.zeros((len(feed.rows), batch.scored), np.int32)
        counts_rC = np.zeros((len(feed.rows), batch.scored), np.bool_)
        for i, row in enumerate(feed.rows):
            if row >= len(requests):
                continue
            tokens, scored = requests[row].tokens, requests[row].scored
            given = len(tokens) - 1
            first = min(given - scored, batch.given - batch.scored)
            inside = slice(given - scored - first, given - first)
            tokens_rT[i, :given], first_r1[i] = tokens[:-1], first
            targets_rC[i, inside], counts_rC[i, inside] = tokens[-scored:], True
        placed = (feed.place(a)[0] for a in (tokens_rT, first_r1, targets_rC, counts_rC))
        return _scores(self.model, self.params, *placed, allowed_V)


def check_fits(requests: Sequence[Request], shape: ModelConfig) -> None:
    """Raises UserError for what a model of this shape cannot score: unknown ids, or more tokens than its context."""
    for request in requests:
        if max(request.tokens) >= shape.vocab_size:
            raise UserError(
                f"a text has the token id {max(request.tokens)}, and the model knows 0 to {shape.vocab_size - 1}: "
                "use the tokenizer the model was trained with"
            )
        if request.scored > shape.n_positions:
            raise UserError(
                f"a continuation has {request.scored} tokens, and the model's context is {shape.n_positions}: it "
                "cannot be scored at once. Leave that task or row out, or take a model with a longer context"
            )


def _longest_first(requests: Sequence[Request]) -> list[int]:
    """Indices of what has something to score, longest first: the time left is then never underestimated, and memory
    runs out at once or not at all. The order follows from the contents alone, so that processes agree on it."""

    def key(index: int) -> tuple[int, list[int], int]:
        return -len(requests[index].tokens), requests[index].tokens, requests[index].scored

    return sorted((index for index, request in enumerate(requests) if request.scored), key=key)


def batches(
    order: Sequence[int], requests: Sequence[Request], context: int, rows_of: Callable[[int], int]
) -> Iterator[Batch]:
    """`order` cut into batches, each padded to one of few shapes."""
    start = 0
    while start < len(order):
        given = padded(len(requests[order[start]].tokens) - 1, _SHORTEST, context)
        rows = rows_of(given)
        indices = list(order[start : start + rows])
        scored = padded(max(requests[index].scored for index in indices), _FEWEST, given)
        yield Batch(indices, rows, given, scored)
        start += rows


def padded(length: int, shortest: int, most: int) -> int:
    """The next of `shortest`, 2 `shortest`, 4 `shortest` ... from `length` on; from 256 on also the middle between two.

    At most `most`.
    """
    power = max(shortest, 1 << (length - 1).bit_length())
    middle = power * 3 // 4
    return min(most, middle if middle >= max(length, 384) else power)


@functools.partial(jax.jit, static_argnums=0)
def _scores(
    model: Model,
    params: Tree,
    tokens_BT: jax.Array,
    first_B1: jax.Array,
    targets_BC: jax.Array,
    counts_BC: jax.Array,
    allowed_V: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """(sum of ln p, all greedy) of the targets that count, (B,); the first target follows given token first_B1."""
    decoder = model.bind(params)
    x_BTD = decoder.hidden(tokens_BT)
    cut = functools.partial(_cut, targets_BC.shape[1])
    states = spec("batch seq embed")
    x_BCD = jax.shard_map(cut, in_specs=(states, spec("batch _")), out_specs=states, check_vma=False)(x_BTD, first_B1)
    logprob_BC, greedy_BC = token_log_likelihoods(x_BCD, decoder.head(), targets_BC, allowed_V=allowed_V)
    logprob_B = jnp.sum(jnp.where(counts_BC, logprob_BC, 0.0), 1)
    return logprob_B, jnp.all(greedy_BC | ~counts_BC, 1)


def _cut(count: int, x_bTD: jax.Array, first_b1: jax.Array) -> jax.Array:
    """`count` hidden states of each row, from its first on."""
    return jax.vmap(lambda x_TD, first: jax.lax.dynamic_slice_in_dim(x_TD, first, count))(x_bTD, first_b1[:, 0])
