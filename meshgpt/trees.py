"""Trees of arrays by named path: `blocks/attn/q_DNH`."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np

Tree: TypeAlias = Any  # a pytree; JAX has no narrower type

MATRIX = r"(?<!_bias)_([A-Z]{2,})$"
"""The names of matrices; what it does not find is a bias or the scale of a norm."""


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


@dataclasses.dataclass(frozen=True)
class MatrixAxes:
    """How the axes of a parameter group: up to `stack` the stacked layers, up to `rows_end` the rows, then columns.

    A parameter's name ends in a letter for each axis of one layer's tensor; N and H, heads and head size, go together.
    """

    stack: int
    rows_end: int

    @staticmethod
    def of(name: str, rank: int) -> "MatrixAxes | None":
        """Those of the parameter `name` of `rank` axes; None for biases, scales of norms and names without letters."""
        letters = re.search(MATRIX, name)
        if letters is None or rank < len(letters[1]):
            return None
        return MatrixAxes(stack=rank - len(letters[1]), rows_end=rank - (2 if letters[1].endswith("NH") else 1))

    def shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(stacked matrices, rows, columns) of a parameter, or of a device's part of it."""
        return (
            math.prod(shape[: self.stack]),
            math.prod(shape[self.stack : self.rows_end]),
            math.prod(shape[self.rows_end :]),
        )


def unzip(like: Tree, rows: Tree, count: int) -> tuple[Tree, ...]:
    """`count` trees like `like` from one that has a tuple of as many at each of its leaves."""
    structure = jax.tree.structure(like)
    tuples = structure.flatten_up_to(rows)
    return tuple(structure.unflatten([row[index] for row in tuples]) for index in range(count))
