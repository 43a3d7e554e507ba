"""Trees of arrays by named path: `blocks/attn/q_DNH`."""

import re
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np

Tree: TypeAlias = Any  # a pytree; JAX has no narrower type


def path_name(path: tuple[Any, ...]) -> str:
    """`blocks/attn/q_DNH` for a key path of `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_with_names(tree: Tree) -> list[tuple[str, Any]]:
    """(name, leaf) of every leaf, in tree order."""
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def map_with_names(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`jax.tree.map` whose function gets the name first."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(path_name(path), *leaves), tree, *rest)


def mask(tree: Tree, pattern: str) -> Tree:
    """A tree of booleans: True where the regular expression `pattern` is found in the leaf's name."""
    return map_with_names(lambda name, _: re.search(pattern, name) is not None, tree)


def count(tree: Tree) -> int:
    """Number of elements of all leaves."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Tree) -> int:
    """Bytes of all leaves, as if on one device."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
