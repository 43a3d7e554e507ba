"""A pytree as orbax items: nested dicts of arrays by name, one item for each top-level entry.

What is on disk names no Python class, so a state of dicts, NamedTuples and dataclasses is read back by its names alone.
"""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from meshgpt.errors import UserError
from meshgpt.trees import Tree, leaves_with_names

METADATA = "metadata"
"""The item of a step that is no part of the state."""

_LEAF = "value"


def save_args(state: Tree) -> dict[str, ocp.args.PyTreeSave]:
    """Orbax's argument for each top-level entry of `state`; entries without a leaf have none."""
    return {name: ocp.args.PyTreeSave(item) for name, item in _items(jax.tree.map(_as_array, state)).items()}


def restore(path: Path, abstract_state: Tree) -> Tree:
    """Reads the leaves of `abstract_state` from the step folder `path`, each process only what its devices hold."""
    abstract_state = _with_shardings(abstract_state)
    restored = {}
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    try:
        for name, item in _items(abstract_state).items():
            _refuse_other_leaves(reader, path / name, item)
            restore_args = jax.tree.map(_restore_arg, item)
            args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args)
            restored[name] = reader.restore(path / name, args=args)
    finally:
        reader.close()
    leaves = [_at(restored, _keys(name)) for name, _ in leaves_with_names(abstract_state)]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)


def _restore_arg(leaf: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=True)


def _refuse_other_leaves(reader: ocp.Checkpointer, path: Path, item: Tree) -> None:
    if not path.is_dir():
        raise UserError(f"checkpoint {path.parent} holds no {path.name!r}: it was saved by another kind of run")
    stored: Any = reader.metadata(path).item_metadata
    saved, wanted = _shapes(stored.tree), _shapes(item)
    differing = [key for key in sorted(saved | wanted) if saved.get(key) != wanted.get(key)]
    if differing:
        key = differing[0]
        raise UserError(
            f"checkpoint {path.parent} does not fit: {path.name}/{key} is {_described(saved.get(key))} in it and "
            f"{_described(wanted.get(key))} in this run ({len(differing)} of {len(saved | wanted)} leaves differ); "
            f"use the configuration it was saved with (its {METADATA}), or another run directory"
        )


def _described(leaf: tuple[tuple[int, ...], str] | None) -> str:
    return "absent" if leaf is None else f"{leaf[1]}{list(leaf[0])}"


def _shapes(tree: Tree) -> dict[str, tuple[tuple[int, ...], str]]:
    """Path -> shape and dtype of each leaf, which may be anything that has both."""
    return {name: (tuple(leaf.shape), str(np.dtype(leaf.dtype))) for name, leaf in leaves_with_names(tree)}


def _items(tree: Tree) -> dict[str, Any]:
    """The leaves of `tree` in nested dicts by name, whatever containers held them: what is on disk names no class."""
    items: dict[str, Any] = {}
    for name, leaf in leaves_with_names(tree):
        *parents, last = _keys(name)
        node = items
        for key in parents:
            node = node.setdefault(key, {})
        if last in node:
            raise ValueError(f"two leaves of the state are named {name}")
        node[last] = leaf
    if METADATA in items:
        raise ValueError(f"the state has an entry {METADATA!r}, a name that checkpoints use themselves")
    return items


def _keys(name: str) -> list[str]:
    """Keys along the name of a leaf; a leaf at the top of the state becomes an item of one leaf."""
    keys = name.split("/")
    for key in keys:
        if not re.fullmatch(r"[A-Za-z0-9_+-]+", key):
            raise ValueError(f"a name in the state is {key!r}: use letters, digits and underscores")
    return keys if len(keys) > 1 else [*keys, _LEAF]


def _at(tree: dict[str, Any], keys: list[str]) -> jax.Array:
    node: Any = tree
    for key in keys:
        node = node[key]
    return node


def _as_array(leaf: Any) -> jax.Array | np.ndarray:
    """A Python or NumPy number becomes the NumPy array of the dtype that JAX gives it: process 0 writes that."""
    return leaf if isinstance(leaf, jax.Array) else np.asarray(jnp.asarray(leaf))


def _with_shardings(abstract: Tree) -> Tree:
    """Every leaf gets a sharding over real devices: `jax.eval_shape` leaves none, or one over an abstract mesh."""
    mesh = jax.sharding.get_mesh()

    def complete(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = leaf.sharding
        if sharding is None and mesh.empty:
            sharding = SingleDeviceSharding(jax.local_devices()[0])
        elif sharding is None:
            sharding = NamedSharding(mesh, PartitionSpec())
        elif isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
            sharding = NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(complete, abstract)
