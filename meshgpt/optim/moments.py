"""How an optimizer keeps a moment in few bits, on any mesh.

Codes have their parameter's shape (rows halved when two share a byte) and lie on the mesh as it does. Scales
follow the rows of its matrices (`trees.MatrixAxes`): no block spans two rows. The layout, and every number in it, is
the same on any mesh, so that a state saved on one is restored on another; where the columns of a block lie on several
devices, these find its scale together.

Legend: G stacked matrices (layers), R rows and C columns of one, K blocks of a row; on one device, its part of them.
X is whatever a row has in an array.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from meshgpt.errors import UserError
from meshgpt.optim import codecs
from meshgpt.trees import MatrixAxes

MIN_ELEMENTS = 4096
"""A smaller matrix stays in float32, as in both papers, and so do all vectors: a thousandth of a model."""

_CHUNK_ELEMENTS = 2**18


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocked:
    """codes: (..., R, C). scales: (..., R, K), the largest magnitude of each block."""

    codes: Any
    scales: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rank1:
    """codes: (..., R, C). rows: (..., R, 1) and columns: (..., 1, C), the largest of each."""

    codes: Any
    rows: Any
    columns: Any


@dataclasses.dataclass(frozen=True)
class Layout:
    """A parameter as matrices on the mesh: its shape and spec as a whole, how its axes group, the sizes of the mesh."""

    axes: MatrixAxes
    shape: tuple[int, ...]
    spec: tuple[Any, ...]
    mesh: dict[str, int]

    @staticmethod
    def of(name: str, leaf: jax.Array) -> "Layout | None":
        """None for vectors."""
        axes = MatrixAxes.of(name, leaf.ndim)
        if axes is None:
            return None
        sharding = jax.typeof(leaf).sharding
        spec = tuple(sharding.spec) + (None,) * (leaf.ndim - len(sharding.spec))
        return Layout(axes, leaf.shape, spec, dict(sharding.mesh.shape))

    @property
    def large(self) -> bool:
        """Whether codes are worth their while; those of 4 bits go by two rows."""
        return (
            math.prod(self.axes.shape(self.shape)[1:]) >= MIN_ELEMENTS and self.shape[self.axes.rows_end - 1] % 2 == 0
        )

    def along(self, start: int, stop: int) -> tuple[str, ...]:
        """The mesh axes of more than one device along the parameter's axes start .. stop - 1."""
        entries = [entry for entry in self.spec[start:stop] if entry is not None]
        names = [name for entry in entries for name in ((entry,) if isinstance(entry, str) else entry)]
        return tuple(name for name in names if self.mesh[name] > 1)

    @property
    def row_cuts(self) -> tuple[str, ...]:
        """The mesh axes that cut the rows."""
        return self.along(self.axes.stack, self.axes.rows_end)

    @property
    def column_cuts(self) -> tuple[str, ...]:
        """The mesh axes that cut the columns."""
        return self.along(self.axes.rows_end, len(self.shape))

    @property
    def columns(self) -> int:
        return self.axes.shape(self.shape)[2]

    @property
    def local_columns(self) -> int:
        return self.columns // math.prod(self.mesh[name] for name in self.column_cuts)

    def zeros(self, shape: tuple[int, ...], spec: PartitionSpec, dtype: Any) -> jax.Array:
        return jnp.zeros(shape, dtype, out_sharding=spec) if self.mesh else jnp.zeros(shape, dtype)

    def matrices(self, array: jax.Array) -> jax.Array:
        """(G, R, X) of a device's part of an array whose axes before the columns' are the parameter's (or 1)."""
        return array.reshape(self.axes.shape(array.shape))


class RowChunk(NamedTuple):
    """`rows` rows from `row` on, of all that one of the stacked matrices has on this device."""

    matrix: jax.Array
    row: jax.Array
    rows: int
    all_rows: int

    def read(self, a_GRX: jax.Array) -> jax.Array:
        """(rows, X): what an array has for these rows, which may be one for two of them, or for all."""
        each = self.all_rows // a_GRX.shape[1]
        size = (1, max(1, self.rows // each), a_GRX.shape[2])
        return jax.lax.dynamic_slice(a_GRX, self._start(each), size)[0]

    def write(self, a_GRX: jax.Array, new_RX: jax.Array) -> jax.Array:
        """The array with these in the place of what `read` gives."""
        return jax.lax.dynamic_update_slice(a_GRX, new_RX[None], self._start(self.all_rows // a_GRX.shape[1]))

    def _start(self, each: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.matrix, self.row // each, jnp.zeros_like(self.row)


def over_chunks(shape: tuple[int, int, int], body: Callable[[RowChunk, Any], Any], carry: Any) -> Any:
    """carry = body(chunk, carry) for chunks of rows that make up a (G, R, C)."""
    matrices, rows, columns = shape
    pairs = rows // 2 if rows % 2 == 0 else rows
    divisors = [d for d in range(1, pairs + 1) if pairs % d == 0]
    chunks = min(divisors, key=lambda d: abs(math.log(rows * columns / d / _CHUNK_ELEMENTS)))

    def step(i: jax.Array, carry: Any) -> Any:
        size = rows // chunks
        return body(RowChunk(i // chunks, i % chunks * size, size, rows), carry)

    return jax.lax.fori_loop(0, matrices * chunks, step, carry)


@dataclasses.dataclass(frozen=True)
class Plain:
    """A moment kept as it is, in a floating-point dtype."""

    dtype: str


class MomentCodec(Protocol):
    """How a moment is kept in codes.

    All but `zeros` and `specs` see one device's arrays, each as (G, R, X); a piece is what `RowChunk.read` gives
    of each.
    """

    def zeros(self, layout: Layout) -> Any:
        """A moment that is 0."""
        ...

    def specs(self, layout: Layout) -> Any:
        """The PartitionSpec of each of its arrays."""
        ...

    def decode(self, layout: Layout, piece: Any) -> jax.Array:
        """(rows, C) float32."""
        ...

    def collect_stats(self, layout: Layout, shape: tuple[int, int, int], new: Callable[[RowChunk], jax.Array]) -> Any:
        """What `encode` needs to know of all of the new moment, which `new` computes chunk by chunk."""
        ...

    def encode(self, layout: Layout, x_RC: jax.Array, old: Any, stats: Any) -> Any:
        """The piece in place of `old` that x makes; `stats` is a piece, too."""
        ...

    def finish(self, state: Any, stats: Any, finite: jax.Array) -> Any:
        """`state` after all its pieces were replaced, which they were where `finite`."""
        ...


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Every `block` columns of a row share a scale (Dettmers et al. 2022, section 2.1)."""

    codec: codecs.Codec
    block: int

    def zeros(self, layout: Layout) -> Blocked:
        shape, spec = (*layout.shape[: layout.axes.rows_end], -(-layout.columns // self.block)), self.specs(layout)
        return Blocked(_no_codes(layout, self.codec), layout.zeros(shape, spec.scales, jnp.float32))

    def specs(self, layout: Layout) -> Blocked:
        end = layout.axes.rows_end
        last = None if self._shared(layout) else layout.spec[end]
        return Blocked(PartitionSpec(*layout.spec), PartitionSpec(*layout.spec[:end], last))

    def decode(self, layout: Layout, piece: Blocked) -> jax.Array:
        return self.codec.decode(_unpacked(piece.codes, self.codec)) * self._spread(layout, piece.scales)

    def collect_stats(self, layout: Layout, shape: tuple[int, int, int], new: Callable[[RowChunk], jax.Array]) -> None:
        return None

    def encode(self, layout: Layout, x_RC: jax.Array, old: Blocked, stats: None) -> Blocked:
        scales_RK = self._scales(layout, x_RC)
        codes_RC = self.codec.encode(x_RC * self._spread(layout, codecs.inverse(scales_RK)))
        return Blocked(_packed(codes_RC, self.codec), scales_RK)

    def finish(self, state: Blocked, stats: None, finite: jax.Array) -> Blocked:
        return state

    def _shared(self, layout: Layout) -> bool:
        """Whether a block's columns may lie on several devices. All of them then have its scale."""
        return bool(layout.column_cuts) and layout.local_columns % self.block != 0

    def _scales(self, layout: Layout, x_RC: jax.Array) -> jax.Array:
        if not self._shared(layout):
            return codecs.block_absmax(x_RC, self.block)
        # Pieces that neither a block nor a device ends within: few numbers, which are gathered and joined to blocks.
        piece = math.gcd(self.block, layout.local_columns)
        pieces = jax.lax.all_gather(codecs.block_absmax(x_RC, piece), layout.column_cuts, axis=1, tiled=True)
        return codecs.block_absmax(pieces, self.block // piece)

    def _spread(self, layout: Layout, scales_RK: jax.Array) -> jax.Array:
        """(R, C): its block's number at each column of this device."""
        columns = layout.local_columns
        if not self._shared(layout):
            return codecs.per_block(scales_RK, self.block, columns)
        piece = math.gcd(self.block, columns)
        pieces = codecs.per_block(scales_RK, self.block // piece, layout.columns // piece)
        first = jax.lax.axis_index(layout.column_cuts) * (columns // piece)
        return codecs.per_block(jax.lax.dynamic_slice_in_dim(pieces, first, columns // piece, 1), piece, columns)


@dataclasses.dataclass(frozen=True)
class RowsAndColumns:
    """An entry's scale is the smaller of its row's and its column's (Li, Chen and Zhu 2023, algorithm 4).

    The moment is not negative. All of a new moment is seen before any of it is written, and so computed twice.
    """

    codec: codecs.Codec

    def zeros(self, layout: Layout) -> Rank1:
        specs, stack, end = self.specs(layout), layout.axes.stack, layout.axes.rows_end
        columns = (*layout.shape[:stack], *(1,) * (end - stack), layout.columns)
        return Rank1(
            _no_codes(layout, self.codec),
            layout.zeros((*layout.shape[:end], 1), specs.rows, jnp.float32),
            layout.zeros(columns, specs.columns, jnp.float32),
        )

    def specs(self, layout: Layout) -> Rank1:
        spec, stack, end = layout.spec, layout.axes.stack, layout.axes.rows_end
        columns = PartitionSpec(*spec[:stack], *(None,) * (end - stack), spec[end])
        return Rank1(PartitionSpec(*spec), PartitionSpec(*spec[:end], None), columns)

    def decode(self, layout: Layout, piece: Rank1) -> jax.Array:
        return self.codec.decode(_unpacked(piece.codes, self.codec)) * codecs.rank1(piece.rows, piece.columns)

    def collect_stats(
        self, layout: Layout, shape: tuple[int, int, int], new: Callable[[RowChunk], jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        def body(chunk: RowChunk, largest: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            rows_GR1, columns_G1C = largest
            x_RC = new(chunk)
            columns = jnp.maximum(chunk.read(columns_G1C), x_RC.max(0, keepdims=True))
            return chunk.write(rows_GR1, x_RC.max(1, keepdims=True)), chunk.write(columns_G1C, columns)

        matrices, rows, columns = shape
        start = jnp.zeros((matrices, rows, 1), jnp.float32), jnp.zeros((matrices, 1, columns), jnp.float32)
        rows_GR1, columns_G1C = over_chunks(shape, body, start)
        return _largest(rows_GR1, layout.column_cuts), _largest(columns_G1C, layout.row_cuts)

    def encode(self, layout: Layout, x_RC: jax.Array, old: Rank1, stats: tuple[jax.Array, jax.Array]) -> Rank1:
        codes_RC = self.codec.encode(x_RC * codecs.inverse_rank1(*stats))
        # The old scales are still needed by the chunks to come.
        return Rank1(_packed(codes_RC, self.codec), old.rows, old.columns)

    def finish(self, state: Rank1, stats: tuple[jax.Array, jax.Array], finite: jax.Array) -> Rank1:
        rows, columns = stats
        return Rank1(state.codes, jnp.where(finite, rows, state.rows), jnp.where(finite, columns, state.columns))


def _largest(x: jax.Array, over: tuple[str, ...]) -> jax.Array:
    return jax.lax.pmax(x, over) if over else x


def _no_codes(layout: Layout, codec: codecs.Codec) -> jax.Array:
    shape, last = list(layout.shape), layout.axes.rows_end - 1
    if codec.bits == 4:
        shape[last] //= 2
        cut = math.prod(layout.mesh[name] for name in layout.along(last, last + 1))
        if shape[last] % cut:
            raise UserError(
                f"4-bit states keep two rows a byte, and {layout.shape[last]} rows on {cut} devices leave each an odd "
                "number of them: give a smaller mesh axis, or an optimizer of 8 bits"
            )
    return layout.zeros(tuple(shape), PartitionSpec(*layout.spec), jnp.uint8)


def _packed(codes_RC: jax.Array, codec: codecs.Codec) -> jax.Array:
    return codes_RC if codec.bits == 8 else codecs.pack(codes_RC)


def _unpacked(codes_RC: jax.Array, codec: codecs.Codec) -> jax.Array:
    return codes_RC if codec.bits == 8 else codecs.unpack(codes_RC)


Format: TypeAlias = Plain | MomentCodec
