"""One optimizer's state as another's, so that a run may go on with another optimizer.

Moments are the same thing in every optimizer that has them, a decaying mean of gradients or of their squares, in
different formats. What both have is decoded, freed of its start at zero by the old decay, given the new one's, and
encoded, one parameter at a time; what the new one lacks is dropped, and what the old one lacks starts at zero.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from meshgpt.distributed import host_memory
from meshgpt.optim.adam import AdamState, packed_layout, zero_moment
from meshgpt.optim.config import Adafactor, Common, Lion, Muon, Optimizer
from meshgpt.optim.moments import Blocked, Format, Layout, MomentCodec, Plain, Rank1, RowChunk, over_chunks
from meshgpt.optim.muon import MuonState
from meshgpt.trees import Tree, leaves_with_names, path_name

# What of an optimizer leaves its state as it is: the rate of its updates, not what it remembers.
_RATES = tuple(field.name for field in dataclasses.fields(Common) if field.name != "state_memory")
_Node: TypeAlias = AdamState | optax.ScaleByLionState | MuonState


@dataclasses.dataclass(frozen=True)
class _Moment:
    """Of one parameter: how it is kept, the decay of its mean, and the updates that it has seen."""

    kept: Format
    leaf: Any
    decay: float
    count: jax.Array


def same_state(old: Optimizer, new: Optimizer) -> bool:
    """Whether the new optimizer goes on from the old one's state as it is, bit for bit."""
    if type(old) is not type(new):
        return False
    return dataclasses.replace(old, **{name: getattr(new, name) for name in _RATES}) == new  # type: ignore[type-var]


def carried(old: Optimizer, state: Tree, new: Optimizer, params: Tree) -> tuple[Tree, list[str]]:
    """The state that `new` goes on from where `old` has left `state`, and what became of the moments, in words.

    Args:
      state: on the devices.
      params: what the optimizers update, on the mesh that is set.
    """
    first, second = _moments(old, state)
    leaves = dict(leaves_with_names(params))
    abstract = jax.eval_shape(new.transformation().init, params)
    paged = new.state_memory != "device"
    said = {"first": _said(bool(first)), "second": "dropped" if second else ""}

    def fill(tree: Tree, wanted: Callable[[str], _Moment | None], kept: Format, decay: float) -> Tree:
        def one(path: Any, leaf: Any) -> Any:
            name = path_name(path)
            found = wanted(name)
            made = (
                zero_moment(kept, name, leaves[name]) if found is None else _recoded(name, found, kept, decay, leaves)
            )
            del leaf
            return jax.jit(host_memory.to_host)(made) if paged else made

        return jax.tree_util.tree_map_with_path(one, tree, is_leaf=_is_moment)

    def node(empty: Any) -> Any:
        if isinstance(empty, AdamState):
            b1, b2 = _decays(new)
            kept_first, kept_second = formats(new)
            names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(empty.nu, is_leaf=_is_moment)]
            whole = all(name in second for name in names)
            said["second"] = _said(whole)
            return AdamState(
                count=first[names[0]].count if first else _zero(),
                mu=fill(empty.mu, first.get, kept_first, b1),
                nu=fill(empty.nu, second.get if whole else lambda _: None, kept_second, b2),
                nu_count=second[names[0]].count if whole else _zero(),
            )
        if isinstance(empty, MuonState):
            assert isinstance(new, Muon)
            return MuonState(fill(empty.mu, first.get, Plain("float32"), new.beta))
        if isinstance(empty, optax.ScaleByLionState):
            assert isinstance(new, Lion)
            count = next(iter(first.values())).count if first else _zero()
            return optax.ScaleByLionState(count, fill(empty.mu, first.get, Plain(new.moment_dtype), new.b2))
        raise AssertionError(f"a state of {type(empty).__name__}")

    if isinstance(new, Adafactor):
        return new.transformation().init(params), ["moments: Adafactor keeps them otherwise, and starts afresh"]
    made = jax.tree.map(node, abstract, is_leaf=_is_node)
    return made, [f"{which} moments: {what}" for which, what in said.items() if what]


def formats(optim: Optimizer) -> tuple[Format, Format]:
    """Of the first and the second moment."""
    if isinstance(optim, Muon | Adafactor):
        return Plain("float32"), Plain("float32")
    if isinstance(optim, Lion):
        return Plain(optim.moment_dtype), Plain("float32")
    return optim.formats


def _decays(optim: Optimizer) -> tuple[float, float]:
    assert not isinstance(optim, Adafactor)
    return (optim.b2, optim.b2) if isinstance(optim, Lion) else (optim.b1, optim.b2)


def _said(there: bool) -> str:
    return "carried over" if there else "start at zero"


def _moments(optim: Optimizer, state: Tree) -> tuple[dict[str, _Moment], dict[str, _Moment]]:
    """The first and second moments by parameter."""
    if isinstance(optim, Adafactor):
        return {}, {}
    nodes: list[_Node] = [node for node in jax.tree.leaves(state, is_leaf=_is_node) if _is_node(node)]
    count = next(node.count for node in nodes if not isinstance(node, MuonState))
    (kept_first, kept_second), (b1, b2) = formats(optim), _decays(optim)
    first, second = {}, {}
    for node in nodes:
        decay = optim.beta if isinstance(node, MuonState) and isinstance(optim, Muon) else b1
        for name, leaf in _leaves(node.mu):
            first[name] = _Moment(kept_first, leaf, decay, jnp.asarray(count))
        if isinstance(node, AdamState):
            for name, leaf in _leaves(node.nu):
                second[name] = _Moment(kept_second, leaf, b2, node.nu_count)
    return first, second


def _leaves(tree: Tree) -> list[tuple[str, Any]]:
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_moment)]


def _recoded(name: str, moment: _Moment, kept: Format, decay: float, leaves: dict[str, jax.Array]) -> Any:
    if (moment.kept, moment.decay) == (kept, decay):
        return moment.leaf

    @jax.jit
    def recode(leaf: Any, count: jax.Array, param: jax.Array) -> Any:
        x = decoded(moment.kept, name, leaf, param)
        if moment.decay != decay:
            t = count.astype(jnp.float32)
            seen = 1 - jnp.float32(moment.decay) ** t
            x = x * jnp.where(count > 0, (1 - jnp.float32(decay) ** t) / jnp.where(count > 0, seen, 1.0), 0.0)
        return encoded(kept, name, x, param)

    return recode(moment.leaf, moment.count, leaves[name])


def decoded(kept: Format, name: str, leaf: Any, param: jax.Array) -> jax.Array:
    """The moment of a parameter in float32."""
    layout = packed_layout(kept, name, param)
    if layout is None:
        return leaf.astype(jnp.float32)
    assert not isinstance(kept, Plain)

    def local(leaf: Any, x: jax.Array) -> jax.Array:
        pieces = jax.tree.map(layout.matrices, leaf)
        x_GRC = layout.matrices(x)

        def body(chunk: RowChunk, x_GRC: jax.Array) -> jax.Array:
            return chunk.write(x_GRC, kept.decode(layout, jax.tree.map(chunk.read, pieces)))

        return over_chunks(layout.axes.shape(x.shape), body, x_GRC).reshape(x.shape)

    return _on_mesh(layout, kept, local, (True, False), False)(leaf, jnp.zeros_like(param, jnp.float32))


def encoded(kept: Format, name: str, x: jax.Array, param: jax.Array) -> Any:
    """A moment in float32 as `kept` keeps that of the parameter."""
    layout = packed_layout(kept, name, param)
    if layout is None:
        return x.astype(kept.dtype) if isinstance(kept, Plain) else x
    assert not isinstance(kept, Plain)

    def local(x: jax.Array, old: Any) -> Any:
        x_GRC, shape = layout.matrices(x), layout.axes.shape(x.shape)
        stats = kept.collect_stats(layout, shape, lambda chunk: chunk.read(x_GRC))

        def body(chunk: RowChunk, state: Any) -> Any:
            old, seen = jax.tree.map(chunk.read, state), jax.tree.map(chunk.read, stats)
            return jax.tree.map(chunk.write, state, kept.encode(layout, chunk.read(x_GRC), old, seen))

        state = over_chunks(shape, body, jax.tree.map(layout.matrices, old))
        state = kept.finish(state, stats, jnp.asarray(True))
        return jax.tree.map(lambda a, like: a.reshape(like.shape), state, old)

    return _on_mesh(layout, kept, local, (False, True), True)(x, kept.zeros(layout))


def _on_mesh(
    layout: Layout, kept: MomentCodec, local: Callable[..., Any], packed: tuple[bool, ...], gives_packed: bool
) -> Callable[..., Any]:
    """`local` on each device's part of its arguments: moments in codes where `packed` says so, else like parameters."""
    if not layout.mesh:
        return local
    plain = PartitionSpec(*layout.spec)
    specs = tuple(kept.specs(layout) if codes else plain for codes in packed)
    out = kept.specs(layout) if gives_packed else plain
    return functools.partial(jax.shard_map, in_specs=specs, out_specs=out, check_vma=False)(local)


def _zero() -> jax.Array:
    return jnp.zeros((), jnp.int32)


def _is_node(node: object) -> bool:
    return isinstance(node, _Node)


def _is_moment(leaf: object) -> bool:
    return isinstance(leaf, Blocked | Rank1)
