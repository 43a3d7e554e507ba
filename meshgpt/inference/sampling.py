"""Drawing the next token: the likeliest, or at random by temperature, top-k and top-p.

Legend: R rows, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from meshgpt.errors import UserError
from meshgpt.flags import OTHER_NAMES
from meshgpt.settings import settings


@settings("sampling")
class Sampling:
    """How new tokens are drawn."""

    max_new_tokens: int = dataclasses.field(default=128, metadata={OTHER_NAMES: ("max_tokens",)})
    """Largest number of tokens generated for each sample; there are fewer at an end of text or where the context is
    full."""
    temperature: float = 1.0
    """Divisor of the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Sample from this many of the likeliest tokens only (and those that tie with the last of them); 0 samples from
    all."""
    top_p: float = 1.0
    """Sample from the fewest of these tokens whose probabilities sum to at least this (Holtzman et al. 2020, section
    3.1); 1 samples from all."""
    seed: int = 0
    """Seed of the draws: token t of sample s of prompt r depends on (seed, r, s, t) alone."""
    samples: int = 1
    """Number of continuations of each prompt."""

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
class Knobs:
    """Scalars of a `Sampling` as arrays, so that another temperature is not another program. top_k=inf is off."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array

    @classmethod
    def of(cls, sampling: Sampling) -> "Knobs":
        return cls(
            temperature=jnp.float32(sampling.temperature),
            top_k=jnp.float32(sampling.top_k or math.inf),
            top_p=jnp.float32(sampling.top_p),
            seed=jnp.uint32(sampling.seed),
        )


def drawable(decodable: np.ndarray | None, vocab_size: int, rows: int) -> np.ndarray | None:
    """bool (rows,): the ids that may be drawn, of a model of `vocab_size` ids in a table of `rows`.

    None is all that the model has: a program without a mask, and so with the bits that it had.

    Args:
      decodable: the tokenizer's (`Tokenizer.decodable`); None for a model that is used without one.
    """
    if decodable is None:
        return None
    allowed = np.zeros(rows, np.bool_)
    known = decodable[:vocab_size]
    allowed[: len(known)] = known
    return None if allowed[:vocab_size].all() else allowed


def draw(logits_RV: jax.Array, prompt_R: jax.Array, sample_R: jax.Array, index_R: jax.Array, knobs: Knobs) -> jax.Array:
    """A token for each row, (R,) int32, of float32 logits on one device.

    The randomness of a row is a function of the seed, its prompt, its sample and its token's index in the text.
    """

    def likeliest() -> jax.Array:
        return jnp.argmax(logits_RV, -1).astype(jnp.int32)

    def random() -> jax.Array:
        # The largest logit becomes 0 first, so that a tiny temperature cannot overflow.
        kept_RV = filtered((logits_RV - logits_RV.max(-1, keepdims=True)) / knobs.temperature, knobs.top_k, knobs.top_p)
        return jax.vmap(one)(prompt_R, sample_R, index_R, kept_RV)

    def one(prompt: jax.Array, sample: jax.Array, index: jax.Array, logits_V: jax.Array) -> jax.Array:
        key = jax.random.key(knobs.seed)
        for number in (prompt, sample, index):
            key = jax.random.fold_in(key, number)
        return jax.random.categorical(key, logits_V).astype(jnp.int32)

    return jax.lax.cond(knobs.temperature == 0, likeliest, random)


def filtered(logits_RV: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The logits, -inf where top-k and then top-p leave a token out; top_k=inf and top_p=1 leave none out.

    Tokens that tie with the last one kept are kept. By a threshold and not by sorting: a sort takes longer, and a
    top-k by sorting needs to know k when it is compiled.
    """
    order_RV = _ordered(logits_RV)

    def cut(enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return jnp.where(order_RV >= _threshold(order_RV, enough), logits_RV, -jnp.inf)

    def k_likeliest() -> jax.Array:
        return cut(lambda kept_RV: jnp.sum(kept_RV, -1, dtype=jnp.float32) >= top_k)

    logits_RV = jax.lax.cond(jnp.isinf(top_k), lambda: logits_RV, k_likeliest)

    def nucleus() -> jax.Array:
        p_RV = jax.nn.softmax(logits_RV, -1)
        return cut(lambda kept_RV: jnp.sum(jnp.where(kept_RV, p_RV, 0.0), -1) >= top_p)

    return jax.lax.cond(top_p >= 1, lambda: logits_RV, nucleus)


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 that compare as the float32 do."""
    bits, sign = jax.lax.bitcast_convert_type(x, jnp.uint32), jnp.uint32(1 << 31)
    return jnp.where(bits & sign == 0, bits | sign, ~bits)


def _threshold(order_RV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """(R, 1): the largest integer for which `enough(order >= integer)` holds, found bit by bit from the highest."""

    def bit(index: jax.Array, found_R1: jax.Array) -> jax.Array:
        candidate_R1 = found_R1 | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
        return jnp.where(enough(order_RV >= candidate_R1)[:, None], candidate_R1, found_R1)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros((order_RV.shape[0], 1), jnp.uint32))
