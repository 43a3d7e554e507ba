"""What of a model is trained: all of it, its last layers, or low-rank adapters beside its frozen matrices.

Each is a pair of functions: `start` takes a model's parameters apart into what is trained (which alone has gradients,
optimizer state and checkpoints) and what is frozen; `joined` puts them together where the loss needs them.
"""

import abc
import difflib
import fnmatch
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from meshgpt.errors import UserError
from meshgpt.models.layers import Weight
from meshgpt.models.lora import LowRank, adapter, factors, merged, smaller_side
from meshgpt.models.scan import Parts
from meshgpt.settings import settings
from meshgpt.trees import MatrixAxes, Tree, leaves_with_names

# The names of these matrices in transformers' models, as PEFT's users give them.
_ALIASES = {
    "c_attn": ("attn/q", "attn/k", "attn/v"),
    "q_proj": ("attn/q",),
    "k_proj": ("attn/k",),
    "v_proj": ("attn/v",),
    "out_proj": ("attn/o",),
    "c_proj": ("attn/o", "mlp/down"),
    "attn.c_proj": ("attn/o",),
    "mlp.c_proj": ("mlp/down",),
    "c_fc": ("mlp/up",),
    "fc_in": ("mlp/up",),
    "fc_out": ("mlp/down",),
}
_BLOCKS = "blocks/"
_DROPOUT_USE = 2**20  # of a step's dropout key; the model's own uses have small numbers


class Backward(NamedTuple):
    """Floating-point operations of a backward pass beside those of the forward pass.

    A matrix takes as many for the gradient of its input as forward, and as many again for its own. Attention has no
    parameters, and takes twice its forward pass wherever a gradient goes through it.
    """

    blocks: float
    attention: float
    head: float


class Part(abc.ABC):
    """A part of a model's parameters. `abstract` is always the whole model's, in shapes, dtypes and shardings."""

    @abc.abstractmethod
    def check(self, abstract: Tree) -> None:
        """Raises UserError for what the model does not have."""

    @abc.abstractmethod
    def start(self, base: Tree, abstract: Tree, key: jax.Array) -> tuple[Tree, Tree]:
        """(what is trained, what is read and never changed) of a model whose parameters are `base`, on the mesh."""

    @abc.abstractmethod
    def joined(self, params: Tree, frozen: Tree, key: jax.Array | None) -> Tree:
        """The model's parameters, for `Model.bind`. key: turns the adapters' dropout on."""

    @abc.abstractmethod
    def merged(self, params: Tree, frozen: Tree) -> Tree:
        """The model's parameters as plain arrays: what is exported and generates."""

    @abc.abstractmethod
    def backward(self, layers: int) -> Backward:
        """Floating-point operations of the backward pass of a model with so many layers."""


@settings("trainable")
class Full(Part):
    """All parameters are trained."""

    def check(self, abstract: Tree) -> None:
        """Every model has all of its parameters."""

    def start(self, base: Tree, abstract: Tree, key: jax.Array) -> tuple[Tree, Tree]:
        return base, {}

    def joined(self, params: Tree, frozen: Tree, key: jax.Array | None) -> Tree:
        return params

    def merged(self, params: Tree, frozen: Tree) -> Tree:
        return params

    def backward(self, layers: int) -> Backward:
        return Backward(2.0, 2.0, 2.0)


@settings("trainable")
class LastLayers(Part):
    """The last blocks and the final norm are trained; embeddings, head and the blocks before them stay as they are.

    No gradient goes through the frozen blocks: a step costs their forward pass only.
    """

    layers: int = 1
    """Number of blocks to train, counted from the last."""

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise UserError(f"trainable.layers={self.layers}: give at least 1")

    def check(self, abstract: Tree) -> None:
        depth = jax.tree.leaves(abstract["blocks"])[0].shape[0]
        if self.layers > depth:
            raise UserError(f"trainable.layers={self.layers}: the model has {depth} layers; give at most {depth}")

    def start(self, base: Tree, abstract: Tree, key: jax.Array) -> tuple[Tree, Tree]:
        blocks = base["blocks"]
        trained = {"blocks": jax.tree.map(lambda a: a[-self.layers :], blocks), "ln_f": base["ln_f"]}
        rest = {name: value for name, value in base.items() if name not in trained}
        return trained, {"base": rest | {"blocks": jax.tree.map(lambda a: a[: -self.layers], blocks)}}

    def joined(self, params: Tree, frozen: Tree, key: jax.Array | None) -> Tree:
        return frozen["base"] | params | {"blocks": _paired(frozen["base"]["blocks"], params["blocks"])}

    def merged(self, params: Tree, frozen: Tree) -> Tree:
        def whole(parts: Parts) -> jax.Array:
            return jnp.concatenate([_dense(parts.first, parts.last.dtype), parts.last])

        joined = self.joined(params, frozen, None)
        blocks = jax.tree.map(whole, joined["blocks"], is_leaf=lambda leaf: isinstance(leaf, Parts))
        return plain(joined | {"blocks": blocks})

    def backward(self, layers: int) -> Backward:
        share = self.layers / layers
        return Backward(2.0 * share, 2.0 * share, 1.0)


@settings("trainable")
class LoRA(Part):
    """Adapters of low rank beside frozen matrices (Hu et al. 2021), in float32; merged, a model costs what it did.

    y = x W + alpha / rank * drop(x) A B, where A is drawn at random and B starts at zero.
    """

    rank: int = 8
    """Rank of each adapter."""
    alpha: float = 16.0
    """Scale of the adapters: their product is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout rate of an adapter's input in training, in [0, 1)."""
    targets: tuple[str, ...] = ("attn/q", "attn/v")
    """Matrices of the blocks to adapt, by name (attn/q, attn/k, attn/v, attn/o, mlp/up, mlp/down), by a pattern such as
    attn/*, or by what transformers calls them (c_attn, q_proj, fc_in, ...)."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"trainable.rank={self.rank}: give at least 1")
        if not self.alpha > 0:
            raise UserError(f"trainable.alpha={self.alpha}: give a number above 0; twice the rank is usual")
        if not 0 <= self.dropout < 1:
            raise UserError(f"trainable.dropout={self.dropout}: give a rate of at least 0 and below 1")
        if not self.targets:
            raise UserError("trainable.targets is empty: name what to adapt, such as attn/q attn/v")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def check(self, abstract: Tree) -> None:
        leaves = dict(leaves_with_names(abstract))
        for name in self.names(abstract):
            if self.rank > (side := smaller_side(name, leaves[name])):
                raise UserError(
                    f"trainable.rank={self.rank} is above {side}, the smaller side of {name}: no product of two "
                    "matrices of that rank is more than the matrix itself"
                )

    def names(self, abstract: Tree) -> list[str]:
        """The parameters that `targets` name, in order.

        Raises:
          UserError: a target that matches nothing, with the nearest names.
        """
        known = {_short(name): name for name in _matrices(abstract)}
        found: set[str] = set()
        for target in self.targets:
            patterns = _ALIASES.get(target, (target,))
            matching = {name for short, name in known.items() if any(_matches(short, name, one) for one in patterns)}
            if not matching:
                short = difflib.get_close_matches(target, [*known, *_ALIASES], n=3, cutoff=0.3) or list(known)
                raise UserError(
                    f"trainable.targets: nothing that LoRA can adapt is named {target!r}; the nearest: "
                    f"{', '.join(short)} (all: {', '.join(known)})"
                )
            found |= matching
        return sorted(found)

    def start(self, base: Tree, abstract: Tree, key: jax.Array) -> tuple[Tree, Tree]:
        leaves, adapters = dict(leaves_with_names(abstract)), {}
        for index, name in enumerate(self.names(abstract)):
            *parents, last = name.split("/")
            node = adapters
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = adapter(name, leaves[name], self.rank, jax.random.fold_in(key, index))
        return adapters, {"base": base}

    def joined(self, params: Tree, frozen: Tree, key: jax.Array | None) -> Tree:
        drawn = None if key is None or not self.dropout else jax.random.fold_in(key, _DROPOUT_USE)
        count = 0

        def low_rank(base: Any, adapter: dict[str, jax.Array]) -> LowRank:
            nonlocal count
            a, b = factors(adapter)
            keys = None
            if drawn is not None:  # one for each layer, as numbers: layers are sliced off them like any tensor's
                keys = jax.random.key_data(jax.random.split(jax.random.fold_in(drawn, count), a.shape[0]))
            count += 1
            return LowRank(base, a, b, keys, self.scale, self.dropout)

        return _with_adapters(frozen["base"], params, low_rank)

    def merged(self, params: Tree, frozen: Tree) -> Tree:
        return plain(self.joined(params, frozen, None))

    def backward(self, layers: int) -> Backward:
        # The gradients of the frozen matrices are left out; what the adapters take is next to nothing.
        return Backward(1.0, 2.0, 1.0)


Trainable: TypeAlias = Full | LastLayers | LoRA


def _matrices(abstract: Tree) -> list[str]:
    """What LoRA can adapt: the blocks' matrices."""
    leaves = leaves_with_names(abstract)
    return [name for name, leaf in leaves if name.startswith(_BLOCKS) and MatrixAxes.of(name, leaf.ndim) is not None]


def _short(name: str) -> str:
    return name.removeprefix(_BLOCKS).rsplit("_", 1)[0]


def _matches(short: str, name: str, pattern: str) -> bool:
    forms = (short, name, name.removeprefix(_BLOCKS), short.rsplit("/", 1)[-1])
    return any(fnmatch.fnmatchcase(form, pattern) for form in forms)


def _with_adapters(base: Any, adapters: Any, low_rank: Any) -> Any:
    """`base` with `low_rank(leaf, adapter)` in the place of every leaf that has an adapter."""
    if not isinstance(base, dict):
        return low_rank(base, adapters)
    return {
        name: _with_adapters(value, adapters[name], low_rank) if name in adapters else value
        for name, value in base.items()
    }


def _paired(first: Any, last: Any) -> Any:
    if isinstance(last, dict):
        return {name: _paired(first[name], value) for name, value in last.items()}
    return Parts(first, last)


def plain(tree: Tree) -> Tree:
    """Every `Weight` of a tree as the array that it stands for."""
    return jax.tree.map(lambda leaf: _dense(leaf, jnp.dtype("float32")), tree, is_leaf=lambda x: isinstance(x, Weight))


def _dense(value: Any, dtype: jnp.dtype) -> jax.Array:
    """An array as it is, a stacked `Weight` dense: in the dtype of its base where that is an array, else in `dtype`."""
    if isinstance(value, LowRank):
        return merged(value, value.base.dtype if isinstance(value.base, jax.Array) else dtype)
    return jax.vmap(lambda one: one.dense(dtype))(value) if isinstance(value, Weight) else value
