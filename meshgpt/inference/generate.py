"""Text from a model: a cache of keys and values, one compiled prefill, one compiled decode of several tokens.

Legend: P prompts (padded), R rows = prompts x samples (padded), T prompt tokens (padded), S cache slots, D d_model,
V padded vocabulary, C tokens of one decode call.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from meshgpt.data.tokenizer import Tokenizer
from meshgpt.distributed.batch import fetch
from meshgpt.distributed.mesh import batch_shards, spec
from meshgpt.errors import UserError
from meshgpt.inference.cpu_layout import RowsOfOutputs
from meshgpt.inference.sampling import Knobs, Sampling, draw, drawable
from meshgpt.models.decoder import Decoder, single_blocks
from meshgpt.models.kv_cache import LayerCache, Slots
from meshgpt.models.layers import Weight, weight
from meshgpt.models.model import Model
from meshgpt.trees import MatrixAxes, Tree, path_name

# Tokens of one call of the compiled decode: it amortises a call's cost, and Ctrl-C waits no longer than this.
CHUNK = 32
# A cache begins at this many slots and doubles: attention reads all slots, and each size is compiled once.
_FIRST_SLOTS = 256
_SHORTEST_PROMPT = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Ready:
    """A decoder and its single blocks."""

    decoder: Decoder
    blocks: list[nnx.Module]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
    """What stays the same of each row: its prompt and sample (indices), prompt length, most tokens to draw, and the ids
    that end it, (R, E), -1 for none."""

    prompt_R: jax.Array
    sample_R: jax.Array
    length_R: jax.Array
    limit_R: jax.Array
    stop_RE: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """Where generation stands: each row's last token, how many it has drawn, whether it is done, and the caches."""

    token_R: jax.Array
    drawn_R: jax.Array
    done_R: jax.Array
    caches: tuple[LayerCache, ...]


def generate(
    model: Model,
    params: Tree,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    stop_ids: Collection[int] = (),
    begin_id: int | None = None,
    decodable: np.ndarray | None = None,
) -> list[list[list[int]]]:
    """New token ids of each sample of each prompt, without the id that ended them.

    Needs a mesh set. For several calls make one `Generator`.

    Args:
      stop_ids: a sample ends at the first of these; none ends it before `max_new_tokens` where there are none.
      begin_id: what an empty prompt begins with.
      decodable: the tokenizer's: no other id is drawn, where the model has more. None draws any of the model's.

    Raises:
      UserError: no prompts, an id the model does not know, a prompt that leaves no room in the context.
    """
    return Generator(model, params).generate(
        prompts, sampling, stop_ids=stop_ids, begin_id=begin_id, decodable=decodable
    )


def generate_text(
    model: Model,
    params: Tree,
    tokenizer: Tokenizer,
    prompts: list[str],
    sampling: Sampling,
    *,
    parse_special: bool = False,
) -> list[list[str]]:
    """The continuations (without their prompts) of each prompt. parse_special: as in `Tokenizer.encode_batch`."""
    ids = generate(
        model, params, tokenizer.encode_batch(prompts, parse_special=parse_special), sampling,
        stop_ids=tokenizer.stop_ids, begin_id=tokenizer.prefix_id, decodable=tokenizer.decodable,
    )  # fmt: skip
    return [[tokenizer.decode(sample) for sample in samples] for samples in ids]


class Generator:
    """A model made ready to generate.

    It holds a second copy of the parameters: single blocks, in the compute dtype, gathered over `fsdp`. A model too
    large for that is spread over the mesh's `tensor` axis.
    """

    def __init__(self, model: Model, params: Tree):
        self._model = model
        self._ready = _prepare(model, params)

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        *,
        stop_ids: Collection[int] = (),
        begin_id: int | None = None,
        decodable: np.ndarray | None = None,
        enough: Callable[[list[int]], bool] | None = None,
    ) -> list[list[list[int]]]:
        """See the function `generate`. `enough` tells of a sample's tokens so far whether they are all that is wanted;
        it is asked every `CHUNK` tokens, so that what comes back may be longer."""
        shape = self._model.config
        prompts = _checked(prompts, shape.vocab_size, shape.n_positions, begin_id)
        longest = max(map(len, prompts))
        shards = batch_shards()
        rows, done_R = _rows(prompts, sampling, shape.n_positions, shards, stop_ids)
        last = longest + int(fetch(rows.limit_R).max())
        slots = _slots(longest + 1, last, shape.n_positions)
        knobs, allowed_V = Knobs.of(sampling), drawable(decodable, shape.vocab_size, shape.padded_vocab)
        tokens_PT, lengths_P = _padded(prompts, _power(longest, shape.n_positions), shards)
        out_RC, state = _prefill(self._ready, tokens_PT, lengths_P, rows, done_R, knobs, slots, allowed_V)
        found = [fetch(out_RC)]
        while not fetch(state.done_R).all():
            used = longest + int(fetch(state.drawn_R).max()) - 1
            if used == slots:
                slots = _slots(used + 1, last, shape.n_positions)
                state = _grow(state, slots)
            steps = min(CHUNK, slots - used)
            out_RC, state = _decode(self._ready, rows, knobs, state, np.int32(steps), allowed_V)
            found.append(fetch(out_RC)[:, :steps])
            if enough is not None:
                state = _end(state, _ended(np.concatenate(found, 1), state, enough))
        return _collected(np.concatenate(found, 1), fetch(state.drawn_R), len(prompts), sampling.samples, stop_ids)


def _checked(prompts: list[list[int]], vocab_size: int, n_positions: int, begin_id: int | None) -> list[list[int]]:
    if not prompts:
        raise UserError("there is no prompt: give at least one (an empty one starts a new text)")
    if begin_id is None and not all(prompts):
        raise UserError(
            f"prompt {[bool(p) for p in prompts].index(False)} is empty and there is no id that texts begin with: "
            "give it a token"
        )
    filled = [list(prompt) or [begin_id or 0] for prompt in prompts]
    for index, prompt in enumerate(filled):
        wrong = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise UserError(
                f"prompt {index} has the token id {wrong}, and the model knows 0 to {vocab_size - 1}: "
                "use the tokenizer the model was trained with"
            )
        if len(prompt) >= n_positions:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens, and the model's context is {n_positions}: "
                f"cut it to at most {n_positions - 1}, which leaves room for one new token"
            )
    return filled


def _power(length: int, most: int) -> int:
    """The power of two from `length` up (so that few lengths are compiled), or `most`."""
    return min(most, max(_SHORTEST_PROMPT, 1 << (length - 1).bit_length()))


def _slots(needed: int, last: int, n_positions: int) -> int:
    """The cache's length for `needed` slots now and `last` in the end, which is above the context where a short prompt
    is continued for longer than the longest could be."""
    most = max(n_positions, -(-last // _FIRST_SLOTS) * _FIRST_SLOTS)
    return min(_power(last, most), max(_FIRST_SLOTS, _power(needed, most)))


def _padded(prompts: list[list[int]], length: int, shards: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens_PT, lengths_P), prompts to the left of each row."""
    rows = -(-len(prompts) // shards) * shards
    tokens_PT, lengths_P = np.zeros((rows, length), np.int32), np.ones(rows, np.int32)
    for index, prompt in enumerate(prompts):
        tokens_PT[index, : len(prompt)] = prompt
        lengths_P[index] = len(prompt)
    return tokens_PT, lengths_P


def _rows(
    prompts: list[list[int]], sampling: Sampling, n_positions: int, shards: int, stop_ids: Collection[int]
) -> tuple[_Rows, np.ndarray]:
    """The rows, and which of them are done before they begin: the padding."""
    real = len(prompts) * sampling.samples
    count = -(-real // shards) * shards
    prompt_R = np.pad(np.arange(real) // sampling.samples, (0, count - real))
    length_R = np.array([len(prompt) for prompt in prompts])[prompt_R]
    limit_R = np.minimum(sampling.max_new_tokens, n_positions - length_R)
    sample_R, stop_RE = np.arange(count) % sampling.samples, np.tile(sorted(stop_ids) or [-1], (count, 1))
    rows = _Rows(*(jnp.asarray(a, jnp.int32) for a in (prompt_R, sample_R, length_R, limit_R, stop_RE)))
    return rows, np.arange(count) >= real


def _collected(
    tokens_RC: np.ndarray, drawn_R: np.ndarray, prompts: int, samples: int, stop_ids: Collection[int]
) -> list[list[list[int]]]:
    def one(row: int) -> list[int]:
        tokens = tokens_RC[row, : drawn_R[row]].tolist()
        return tokens[:-1] if tokens[-1] in stop_ids else tokens

    return [[one(prompt * samples + sample) for sample in range(samples)] for prompt in range(prompts)]


def _ended(tokens_RC: np.ndarray, state: _State, enough: Callable[[list[int]], bool]) -> np.ndarray:
    """Which rows are done, or have enough."""
    done_R, drawn_R = fetch(state.done_R), fetch(state.drawn_R)
    return np.array(
        [done or enough(row[:drawn].tolist()) for row, drawn, done in zip(tokens_RC, drawn_R, done_R, strict=True)]
    )


@functools.partial(jax.jit, donate_argnums=0)
def _end(state: _State, done_R: jax.Array) -> _State:
    return dataclasses.replace(state, done_R=jax.sharding.reshard(done_R, spec("batch")))


@functools.partial(jax.jit, static_argnums=0)
def _prepare(model: Model, params: Tree) -> _Ready:
    """The parameters as generation uses them: see `Generator`."""
    decoder = model.bind(params)
    in_rows = jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().size == 1

    def ready(path: tuple[Any, ...], leaf: nnx.Param) -> nnx.Variable:
        if isinstance(leaf.get_value(), Weight):  # stays in its few bits until a matmul asks for it
            return leaf
        matrix = MatrixAxes.of(path_name(path), leaf.ndim)
        # Vectors keep their dtype: norms compute in float32.
        whole = weight(leaf, leaf.dtype if matrix is None else model.precision.compute_dtype)
        return leaf.replace(RowsOfOutputs.of(whole, matrix.rows_end) if matrix and in_rows else whole)

    blocks = jax.tree_util.tree_map_with_path(
        ready, single_blocks(decoder), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    decoder.blocks = nnx.Module()  # the stack, which nothing uses any more
    return _Ready(decoder, blocks)


@functools.partial(jax.jit, static_argnames="slots")
def _prefill(
    ready: _Ready,
    tokens_PT: jax.Array,
    lengths_P: jax.Array,
    rows: _Rows,
    done_R: jax.Array,
    knobs: Knobs,
    slots: int,
    allowed_V: jax.Array | None = None,
) -> tuple[jax.Array, _State]:
    """The prompts through the model once, a row for each sample of each, and every row's first token."""
    rows = _on_mesh(rows)
    tokens_PT = jax.sharding.reshard(tokens_PT, spec("batch _"))
    caches = ready.decoder.empty_caches(*tokens_PT.shape)
    order_PT = jnp.zeros_like(tokens_PT) + jnp.arange(tokens_PT.shape[1])[None]
    causal = Slots(jnp.int32(0), order_PT[:, None] <= order_PT[..., None])
    x_PTD, caches = ready.decoder.forward_cached(tokens_PT, order_PT, causal, caches, ready.blocks)
    at_end = order_PT == jax.sharding.reshard(lengths_P, spec("batch"))[:, None] - 1
    x_P1D = jnp.sum(jnp.where(at_end[..., None], x_PTD, jnp.zeros_like(x_PTD)), 1, keepdims=True)
    logits_RV = ready.decoder.logits(x_P1D)[:, 0].at[rows.prompt_R].get(out_sharding=spec("batch _"))
    heads = ready.decoder.shape.n_heads
    caches = tuple(cache.of_rows(rows.prompt_R, heads).lengthened(slots) for cache in caches)
    done_R = jax.sharding.reshard(done_R, spec("batch"))
    state = _State(rows.prompt_R, jnp.zeros_like(rows.length_R), done_R, caches)
    return _drawn(logits_RV, rows, knobs, allowed_V, state)


@functools.partial(jax.jit, static_argnames="slots")
def _grow(state: _State, slots: int) -> _State:
    return dataclasses.replace(state, caches=tuple(cache.lengthened(slots) for cache in state.caches))


@functools.partial(jax.jit, donate_argnames="state")
def _decode(
    ready: _Ready,
    rows: _Rows,
    knobs: Knobs,
    state: _State,
    steps: jax.Array,
    allowed_V: jax.Array | None = None,
) -> tuple[jax.Array, _State]:
    """Up to `steps` more tokens of each row: (R, CHUNK), of which a row's valid ones are those it has drawn."""
    rows = _on_mesh(rows)
    longest = jnp.max(jax.sharding.reshard(rows.length_R, spec("_")))
    slots_1S = jnp.arange(state.caches[0].k_CSH.shape[1])[None]
    own_RS = slots_1S < rows.length_R[:, None]  # the prompt; between its end and `longest` a row's slots hold padding

    def unfinished(carry: tuple[jax.Array, jax.Array, _State]) -> jax.Array:
        step, _, state = carry
        return (step < steps) & ~jnp.all(state.done_R)

    def body(carry: tuple[jax.Array, jax.Array, _State]) -> tuple[jax.Array, jax.Array, _State]:
        step, out_RC, state = carry
        # Rows that are not done have drawn equally many.
        slot = longest + jnp.max(jax.sharding.reshard(state.drawn_R, spec("_"))) - 1
        seen_RS = own_RS | ((slots_1S >= longest) & (slots_1S <= slot))
        positions_R1 = (rows.length_R + state.drawn_R - 1)[:, None]
        slots = Slots(slot, seen_RS[:, None])
        x_R1D, caches = ready.decoder.forward_cached(
            state.token_R[:, None], positions_R1, slots, state.caches, ready.blocks
        )
        token_R1, state = _drawn(
            ready.decoder.logits(x_R1D)[:, 0], rows, knobs, allowed_V, dataclasses.replace(state, caches=caches)
        )
        return step + 1, jax.lax.dynamic_update_slice_in_dim(out_RC, token_R1, step, 1), state

    out_RC = jnp.zeros((state.token_R.shape[0], CHUNK), jnp.int32, out_sharding=spec("batch _"))
    _, out_RC, state = jax.lax.while_loop(unfinished, body, (jnp.int32(0), out_RC, state))
    return jax.sharding.reshard(out_RC, spec("_ _")), state


def _on_mesh(rows: _Rows) -> _Rows:
    return jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, spec("batch _" if leaf.ndim == 2 else "batch")), rows)


def _drawn(
    logits_RV: jax.Array, rows: _Rows, knobs: Knobs, allowed_V: jax.Array | None, state: _State
) -> tuple[jax.Array, _State]:
    """One token a row, (R, 1), and the state after it. A row that is done stays as it is."""
    logits_RV = jax.sharding.reshard(logits_RV, spec("batch _"))
    if allowed_V is not None:
        logits_RV = jnp.where(jax.sharding.reshard(allowed_V, spec("_"))[None], logits_RV, -jnp.inf)
    by_row, same = spec("batch"), jax.tree.map(lambda _: spec(""), knobs)
    token_R = jax.shard_map(
        draw, in_specs=(spec("batch _"), by_row, by_row, by_row, same), out_specs=by_row, check_vma=False
    )(logits_RV, rows.prompt_R, rows.sample_R, state.drawn_R, knobs)
    token_R = jnp.where(state.done_R, state.token_R, token_R)
    drawn_R = jnp.where(state.done_R, state.drawn_R, state.drawn_R + 1)
    done_R = state.done_R | jnp.any(token_R[:, None] == rows.stop_RE, -1) | (drawn_R >= rows.limit_R)
    return token_R[:, None], _State(token_R, drawn_R, done_R, state.caches)
