"""Text from a model: a cache of keys and values, one compiled prefill, one compiled decode of several tokens.

Legend: P prompts (padded), R rows = prompts x samples (padded), T prompt tokens (padded), S cache slots, D d_model,
V padded vocabulary, C tokens of one decode call.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from meshgpt.axes import spec
from meshgpt.decoder import Decoder, single_blocks
from meshgpt.errors import UserError
from meshgpt.feed import fetch
from meshgpt.layers import LayerCache, weight
from meshgpt.models import Model
from meshgpt.tokenizer import Tokenizer
from meshgpt.trees import Tree

# Tokens of one call of the compiled decode: it amortises a call's cost, and Ctrl-C waits no longer than this.
CHUNK = 32
# A cache begins at this many slots and doubles: attention reads all slots, and each size is compiled once.
_FIRST_SLOTS = 256
_SHORTEST_PROMPT = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How new tokens are drawn.

    max_new_tokens: per sample; fewer at an end of text or where the context is full. temperature: divides the logits;
    0 takes the likeliest token. top_k: only the k likeliest tokens (ties of the k-th too); 0 is off. top_p: of these,
    the fewest whose probability is at least p (Holtzman et al. 2020, section 3.1); 1 is off. seed: token t of sample s
    of prompt r is drawn with randomness that depends on (seed, r, s, t) alone. samples: continuations of each prompt.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    samples: int = 1

    def __post_init__(self) -> None:
        def refuse(name: str, remedy: str) -> None:
            raise UserError(f"sampling {name}={getattr(self, name)}: {remedy}")

        if self.max_new_tokens < 1:
            refuse("max_new_tokens", "give at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            refuse("temperature", "give 0 for the likeliest token, or a positive number")
        if self.top_k < 0:
            refuse("top_k", "give a number of tokens, or 0 for all")
        if not 0 < self.top_p <= 1:
            refuse("top_p", "give a probability in (0, 1]; 1 turns it off")
        if not 0 <= self.seed < 2**32:
            refuse("seed", "give a number from 0 to 4294967295")
        if self.samples < 1:
            refuse("samples", "give at least 1")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Knobs:
    """`Sampling` as arrays, so that another temperature is not another program."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array
    eot: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
    """What stays the same of each row: its prompt and sample (indices), prompt length, and most tokens to draw."""

    prompt_R: jax.Array
    sample_R: jax.Array
    length_R: jax.Array
    limit_R: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """Where generation stands: each row's last token, how many it has drawn, whether it is done, and the caches."""

    token_R: jax.Array
    drawn_R: jax.Array
    done_R: jax.Array
    caches: tuple[LayerCache, ...]


def generate(
    model: Model, params: Tree, prompts: list[list[int]], sampling: Sampling, *, eot_id: int | None
) -> list[list[list[int]]]:
    """New token ids of each sample of each prompt, without the end-of-text id that ended them.

    Needs a mesh set. An empty prompt begins with the end of text. For several calls make one `Generator`.

    Raises:
      UserError: no prompts, an id the model does not know, a prompt that leaves no room in the context.
    """
    return Generator(model, params).generate(prompts, sampling, eot_id=eot_id)


def generate_text(
    model: Model, params: Tree, tokenizer: Tokenizer, prompts: list[str], sampling: Sampling
) -> list[list[str]]:
    """The continuations (without their prompts) of each prompt."""
    ids = generate(model, params, tokenizer.encode_batch(prompts), sampling, eot_id=tokenizer.eot_id)
    return [[tokenizer.decode(sample) for sample in samples] for samples in ids]


class Generator:
    """A model made ready to generate.

    It holds a second copy of the parameters: single blocks, in the compute dtype, gathered over `fsdp`. A model too
    large for that is spread over the mesh's `tensor` axis.
    """

    def __init__(self, model: Model, params: Tree):
        self._model = model
        self._decoder = _prepare(model, params)

    def generate(self, prompts: list[list[int]], sampling: Sampling, *, eot_id: int | None) -> list[list[list[int]]]:
        """See the function `generate`."""
        shape = self._model.config
        prompts = _checked(prompts, shape.vocab_size, shape.n_positions, eot_id)
        longest = max(map(len, prompts))
        last = min(shape.n_positions, longest + sampling.max_new_tokens)
        slots = _slots(longest + 1, last, shape.n_positions)
        shards = _batch_shards()
        rows, done_R = _rows(prompts, sampling, shape.n_positions, shards)
        knobs = _knobs(sampling, eot_id)
        tokens_PT, lengths_P = _padded(prompts, _power(longest, shape.n_positions), shards)
        out_RC, state = _prefill(self._decoder, tokens_PT, lengths_P, rows, done_R, knobs, slots)
        found = [fetch(out_RC)]
        while not (done_R := fetch(state.done_R)).all():
            used = int((rows.length_R + fetch(state.drawn_R) - 1)[~done_R].max())
            if used == slots:
                slots = _slots(used + 1, last, shape.n_positions)
                state = _grow(state, slots)
            steps = min(CHUNK, slots - used)
            out_RC, state = _decode(self._decoder, rows, knobs, state, np.int32(steps))
            found.append(fetch(out_RC)[:, :steps])
        return _collected(np.concatenate(found, 1), fetch(state.drawn_R), len(prompts), sampling.samples, eot_id)


def _checked(prompts: list[list[int]], vocab_size: int, n_positions: int, eot_id: int | None) -> list[list[int]]:
    if not prompts:
        raise UserError("there is no prompt: give at least one (an empty one begins with the end of text)")
    if eot_id is None and not all(prompts):
        raise UserError(f"prompt {[bool(p) for p in prompts].index(False)} is empty and there is no end-of-text id to "
                        "begin with: give it a token")  # fmt: skip
    filled = [list(prompt) or [eot_id or 0] for prompt in prompts]
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
    """The cache's length for `needed` slots now and `last` in the end."""
    return min(_power(last, n_positions), max(_FIRST_SLOTS, _power(needed, n_positions)))


def _batch_shards() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape["data"] * mesh.shape["fsdp"]


def _padded(prompts: list[list[int]], length: int, shards: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens_PT, lengths_P), prompts to the left of each row."""
    rows = -(-len(prompts) // shards) * shards
    tokens_PT, lengths_P = np.zeros((rows, length), np.int32), np.ones(rows, np.int32)
    for index, prompt in enumerate(prompts):
        tokens_PT[index, : len(prompt)] = prompt
        lengths_P[index] = len(prompt)
    return tokens_PT, lengths_P


def _rows(prompts: list[list[int]], sampling: Sampling, n_positions: int, shards: int) -> tuple[_Rows, np.ndarray]:
    """The rows, and which of them are done before they begin: the padding."""
    real = len(prompts) * sampling.samples
    padding = -real % shards
    prompt_R = np.pad(np.arange(real, dtype=np.int32) // sampling.samples, (0, padding))
    length_R = np.array([len(prompt) for prompt in prompts], np.int32)[prompt_R]
    limit_R = np.minimum(sampling.max_new_tokens, n_positions - length_R).astype(np.int32)
    sample_R = np.arange(real + padding, dtype=np.int32) % sampling.samples
    return _Rows(prompt_R, sample_R, length_R, limit_R), np.arange(real + padding) >= real


def _knobs(sampling: Sampling, eot_id: int | None) -> _Knobs:
    return _Knobs(
        temperature=np.float32(sampling.temperature),
        top_k=np.float32(sampling.top_k or np.inf),
        top_p=np.float32(sampling.top_p),
        seed=np.uint32(sampling.seed),
        eot=np.int32(-1 if eot_id is None else eot_id),
    )


def _collected(
    tokens_RC: np.ndarray, drawn_R: np.ndarray, prompts: int, samples: int, eot_id: int | None
) -> list[list[list[int]]]:
    def one(row: int) -> list[int]:
        tokens = tokens_RC[row, : drawn_R[row]].tolist()
        return tokens[:-1] if tokens[-1] == eot_id else tokens

    return [[one(prompt * samples + sample) for sample in range(samples)] for prompt in range(prompts)]


@functools.partial(jax.jit, static_argnums=0)
def _prepare(model: Model, params: Tree) -> Decoder:
    """The decoder with its stack split into a list of blocks, gathered over `fsdp`, matrices in the compute dtype."""
    decoder = model.bind(params)

    def ready(leaf: nnx.Param) -> nnx.Param:
        value = leaf.get_value()
        return leaf.replace(weight(leaf, model.precision.compute_dtype if value.ndim > 1 else value.dtype))

    blocks = single_blocks(decoder)
    decoder.blocks = nnx.List(jax.tree.map(ready, blocks, is_leaf=lambda leaf: isinstance(leaf, nnx.Param)))
    return decoder


@functools.partial(jax.jit, static_argnames="slots")
def _prefill(
    decoder: Decoder,
    tokens_PT: jax.Array,
    lengths_P: jax.Array,
    rows: _Rows,
    done_R: jax.Array,
    knobs: _Knobs,
    slots: int,
) -> tuple[jax.Array, _State]:
    """The prompts through the model once, a row for each sample of each, and every row's first token."""
    rows = _on_mesh(rows)
    tokens_PT = jax.sharding.reshard(tokens_PT, spec("batch _"))
    caches = decoder.empty_caches(*tokens_PT.shape)
    x_PTD, caches = decoder.extend(tokens_PT, jnp.zeros_like(lengths_P), caches, list(decoder.blocks))
    at_end = jnp.arange(tokens_PT.shape[1])[None] == jax.sharding.reshard(lengths_P, spec("batch"))[:, None] - 1
    x_P1D = jnp.sum(jnp.where(at_end[..., None], x_PTD, jnp.zeros_like(x_PTD)), 1, keepdims=True)
    logits_RV = _of_rows(decoder.logits(x_P1D)[:, 0], rows, "batch _")
    caches = jax.tree.map(lambda c: _lengthened(_of_rows(c, rows, "batch _ heads _"), slots), caches)
    done_R = jax.sharding.reshard(done_R, spec("batch"))
    return _drawn(logits_RV, rows, knobs, _State(rows.prompt_R, jnp.zeros_like(rows.length_R), done_R, caches))


def _of_rows(a_P: jax.Array, rows: _Rows, axes: str) -> jax.Array:
    """Each row's own slice of an array over prompts."""
    return a_P.at[rows.prompt_R].get(out_sharding=spec(axes))


def _lengthened(cache_RSNH: jax.Array, slots: int) -> jax.Array:
    return jnp.pad(cache_RSNH, ((0, 0), (0, slots - cache_RSNH.shape[1]), (0, 0), (0, 0)))


@functools.partial(jax.jit, static_argnames="slots")
def _grow(state: _State, slots: int) -> _State:
    caches = jax.tree.map(lambda cache: _lengthened(cache, slots), state.caches)
    return dataclasses.replace(state, caches=caches)


@functools.partial(jax.jit, donate_argnames="state")
def _decode(decoder: Decoder, rows: _Rows, knobs: _Knobs, state: _State, steps: jax.Array) -> tuple[jax.Array, _State]:
    """Up to `steps` more tokens of each row: (R, CHUNK), of which a row's valid ones are those it has drawn."""
    rows, blocks = _on_mesh(rows), list(decoder.blocks)

    def unfinished(carry: tuple[jax.Array, jax.Array, _State]) -> jax.Array:
        step, _, state = carry
        return (step < steps) & ~jnp.all(state.done_R)

    def body(carry: tuple[jax.Array, jax.Array, _State]) -> tuple[jax.Array, jax.Array, _State]:
        step, out_RC, state = carry
        positions_R = rows.length_R + state.drawn_R - 1
        x_R1D, caches = decoder.extend(state.token_R[:, None], positions_R, state.caches, blocks)
        token_R1, state = _drawn(decoder.logits(x_R1D)[:, 0], rows, knobs, dataclasses.replace(state, caches=caches))
        return step + 1, jax.lax.dynamic_update_slice_in_dim(out_RC, token_R1, step, 1), state

    out_RC = jnp.zeros((state.token_R.shape[0], CHUNK), jnp.int32, out_sharding=spec("batch _"))
    _, out_RC, state = jax.lax.while_loop(unfinished, body, (jnp.int32(0), out_RC, state))
    return jax.sharding.reshard(out_RC, spec("_ _")), state


def _on_mesh(rows: _Rows) -> _Rows:
    return jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, spec("batch")), rows)


def _drawn(logits_RV: jax.Array, rows: _Rows, knobs: _Knobs, state: _State) -> tuple[jax.Array, _State]:
    """One token a row, (R, 1), and the state after it. A row that is done stays as it is."""
    logits_RV = jax.sharding.reshard(logits_RV, spec("batch _"))
    by_row, same = spec("batch"), jax.tree.map(lambda _: spec(""), knobs)
    token_R = jax.shard_map(
        _draw, in_specs=(spec("batch _"), by_row, by_row, by_row, same), out_specs=by_row, check_vma=False
    )(logits_RV, rows.prompt_R, rows.sample_R, state.drawn_R, knobs)
    token_R = jnp.where(state.done_R, state.token_R, token_R)
    drawn_R = jnp.where(state.done_R, state.drawn_R, state.drawn_R + 1)
    done_R = state.done_R | (token_R == knobs.eot) | (drawn_R >= rows.limit_R)
    return token_R[:, None], _State(token_R, drawn_R, done_R, state.caches)


def _draw(
    logits_RV: jax.Array, prompt_R: jax.Array, sample_R: jax.Array, drawn_R: jax.Array, knobs: _Knobs
) -> jax.Array:
    """One token for each of one device's rows."""

    def greedy() -> jax.Array:
        return jnp.argmax(logits_RV, -1).astype(jnp.int32)

    def sampled() -> jax.Array:
        kept_RV = filtered(logits_RV / knobs.temperature, knobs.top_k, knobs.top_p)

        def one(prompt: jax.Array, sample: jax.Array, drawn: jax.Array, logits_V: jax.Array) -> jax.Array:
            key = jax.random.key(knobs.seed)
            for index in (prompt, sample, drawn):
                key = jax.random.fold_in(key, index)
            return jax.random.categorical(key, logits_V).astype(jnp.int32)

        return jax.vmap(one)(prompt_R, sample_R, drawn_R, kept_RV)

    return jax.lax.cond(knobs.temperature == 0, greedy, sampled)


def filtered(logits_RV: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The logits, -inf where top-k and then top-p leave a token out. top_k=inf and top_p=1 leave none out.

    By thresholds instead of by sorting, which costs more and would need k at compile time.
    """
    order_RV = _ordered(logits_RV)

    def k_most() -> jax.Array:
        def enough(kept_RV: jax.Array) -> jax.Array:
            return jnp.sum(kept_RV, -1, dtype=jnp.float32) >= top_k

        return jnp.where(order_RV >= _threshold(order_RV, enough), logits_RV, -jnp.inf)

    logits_RV = jax.lax.cond(jnp.isinf(top_k), lambda: logits_RV, k_most)

    def nucleus() -> jax.Array:
        p_RV = jax.nn.softmax(logits_RV, -1)

        def enough(kept_RV: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(kept_RV, p_RV, 0.0), -1) >= top_p

        return jnp.where(order_RV >= _threshold(order_RV, enough), logits_RV, -jnp.inf)

    return jax.lax.cond(top_p >= 1, lambda: logits_RV, nucleus)


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 that compare as the float32 do."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign == 0, bits | sign, ~bits)


def _threshold(order_RV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """(R, 1): the largest integer of which `enough(order >= integer)` holds; bit by bit from the highest."""

    def bit(index: jax.Array, found_R1: jax.Array) -> jax.Array:
        candidate_R1 = found_R1 | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
        return jnp.where(enough(order_RV >= candidate_R1)[:, None], candidate_R1, found_R1)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros((order_RV.shape[0], 1), jnp.uint32))
