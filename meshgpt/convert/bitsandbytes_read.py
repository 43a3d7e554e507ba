"""Weights that bitsandbytes quantized, in a folder of transformers': as plain tensors, or as they are, on the mesh.

A quantized matrix is a handful of tensors: `X.weight` (packed), and beside it `X.weight.absmax`, `.quant_map`,
`.nested_absmax`, `.nested_quant_map` and `.quant_state.bitsandbytes__nf4` (JSON as bytes) for 4 bits, `X.SCB` and
`X.weight_format` for 8. It is always (out, in), also where the plain tensor is (in, out), as GPT-2's.

Source: `QuantState` of bitsandbytes 0.50 and `transformers.integrations.bitsandbytes`.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from meshgpt.convert.hf_names import ModelConfig, Stored
from meshgpt.convert.stacking import stacked
from meshgpt.convert.tensors import Entry, Tensors
from meshgpt.errors import UserError
from meshgpt.models import bitsandbytes
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.quantized import Place, Weight4, Weight8

STATE = "quant_state.bitsandbytes__"


@runtime_checkable
class LowBit(Protocol):
    """A quantized matrix of a checkpoint: an `Entry` whose contents are dequantized, or a weight of few bits."""

    @property
    def code(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def map(self) -> np.ndarray: ...

    def assemble(self, layers: Sequence[Any], part: slice, place: Place, mesh: jax.sharding.Mesh) -> Weight4 | Weight8:
        """The weight stacked over `layers`, all like this one; `part` are the rows of the parameter."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantized4:
    """One matrix of 4 bits. parts: its tensors by what follows `X.weight.` in their names. in_out: for `shape`."""

    name: str
    weight: Entry
    parts: Mapping[str, Entry]
    kind: bitsandbytes.FourBit
    shape_OI: tuple[int, int]
    block: int
    nested_block: int
    offset: float
    in_out: bool

    code = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shape_OI[::-1] if self.in_out else self.shape_OI

    def map(self) -> np.ndarray:
        x_OI = bitsandbytes.unpack4(self.packed(), self.absmax(), self.kind, self.block).reshape(self.shape_OI)
        return x_OI.T if self.in_out else x_OI

    def packed(self) -> np.ndarray:
        """(O I / 2,) uint8; files may keep the bytes under the name of a wider dtype."""
        return self.weight.map().reshape(-1).view(np.uint8)

    def absmax(self) -> np.ndarray:
        """(K,) float32."""
        codes = self.parts["absmax"].map()
        if "nested_absmax" in self.parts:
            nested = bitsandbytes.Nested(codes_K=codes, absmax=self.parts["nested_absmax"].map(), offset=self.offset)
            codes = bitsandbytes.unnest(nested, self.parts["nested_quant_map"].map(), self.nested_block)
        if not np.isfinite(codes).all():
            raise UserError(f"{self.name}.absmax holds a value that is not finite: quantize the model again")
        return np.asarray(codes, np.float32)

    def assemble(self, layers: Sequence["Quantized4"], part: slice, place: Place, mesh: jax.sharding.Mesh) -> Weight4:
        if any((layer.kind, layer.block) != (self.kind, self.block) for layer in layers):
            raise UserError(f"{self.name} is {self.kind} in blocks of {self.block}, and other layers are not")
        block = place.block(self.block, mesh)
        if block % 2:
            raise UserError(
                f"{self.name} of {self.shape_OI[1]} inputs cannot be cut into bytes along mesh {mesh.shape}"
            )
        rows, blocks = self.shape_OI[0], self.shape_OI[1] // block
        per_row = (*place.outer, blocks)

        def packed(layer: Quantized4) -> np.ndarray:
            return layer.packed().reshape(rows, blocks, block // 2)[part].reshape(*per_row, block // 2)

        def absmax(layer: Quantized4) -> np.ndarray:
            return np.repeat(layer.absmax(), self.block // block).reshape(rows, blocks)[part].reshape(per_row)

        spec = place.of_blocks()
        return Weight4(
            packed_OKg=_stack(packed, layers, (*per_row, block // 2), np.uint8, PartitionSpec(*spec, None), mesh),
            absmax_OK=_stack(absmax, layers, per_row, np.float32, spec, mesh),
            kind=self.kind,
            place=place,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantized8:
    """One matrix of LLM.int8(). scale: the largest magnitude of each row. in_out: for `shape`."""

    name: str
    weight: Entry
    scale: Entry
    in_out: bool

    code = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape[::-1] if self.in_out else self.weight.shape

    def map(self) -> np.ndarray:
        x_OI = bitsandbytes.unrows8(self.weight.map(), self.largest())
        return x_OI.T if self.in_out else x_OI

    def largest(self) -> np.ndarray:
        """(O,) float32."""
        found = np.asarray(self.scale.map(), np.float32).reshape(-1)
        if not np.isfinite(found).all():
            raise UserError(f"{self.name}: SCB holds a value that is not finite: quantize the model again")
        return found

    def assemble(self, layers: Sequence["Quantized8"], part: slice, place: Place, mesh: jax.sharding.Mesh) -> Weight8:
        shape = (*place.outer, self.weight.shape[1])

        def codes(layer: Quantized8) -> np.ndarray:
            return layer.weight.map()[part].reshape(shape)

        def largest(layer: Quantized8) -> np.ndarray:
            return layer.largest()[part].reshape(place.outer)

        return Weight8(
            codes_OI=_stack(codes, layers, shape, np.int8, place.of_blocks(), mesh),
            largest_O=_stack(largest, layers, place.outer, np.float32, place.of_rows(), mesh),
            place=place,
        )


def plain(tensors: Tensors, config: ModelConfig) -> Tensors:
    """`tensors` with every quantized matrix as one `LowBit` entry in place of its parts; others are as they were."""
    entries = dict(tensors.entries)
    in_out = isinstance(config, GPT2Config)
    for name in [name for name in entries if STATE in name]:
        weight = name.partition(f".{STATE}")[0]
        own = {key.removeprefix(f"{weight}."): key for key in entries if key.startswith(f"{weight}.")}
        parts = {suffix: entries.pop(key) for suffix, key in own.items()}
        entries[weight] = _four_bit(f"{tensors.origin}: {weight}", entries.get(weight), parts, in_out)
    for name in [name for name in entries if name.endswith(".SCB")]:
        module = name.removesuffix(".SCB")
        scale, weight = entries.pop(name), entries[f"{module}.weight"]
        entries.pop(f"{module}.weight_format", None)
        where = f"{tensors.origin}: {module}.weight"
        if weight.code != "I8" or len(weight.shape) != 2 or scale.shape != weight.shape[:1]:
            raise UserError(f"{where} is {weight.code} {weight.shape} with SCB {scale.shape}: int8 rows were expected")
        entries[f"{module}.weight"] = Quantized8(name=where, weight=weight, scale=scale, in_out=in_out)
    return Tensors(origin=tensors.origin, entries=entries)


def _four_bit(where: str, weight: Entry | None, parts: Mapping[str, Entry], in_out: bool) -> Quantized4:
    key = next(suffix for suffix in parts if suffix.startswith(STATE))
    try:
        state = json.loads(parts[key].map().tobytes())
        kind, block, (rows, columns) = state["quant_type"], int(state["blocksize"]), state["shape"]
        nested_block, offset = int(state.get("nested_blocksize", 1)), float(state.get("nested_offset", 0.0))
        nested = {"nested_absmax", "nested_quant_map"} if "nested_blocksize" in state else set()
        missing = ({"absmax", "quant_map"} | nested) - parts.keys()
        if missing or weight is None or kind not in ("nf4", "fp4") or rows * columns % block:
            raise ValueError(
                f"{kind} of {rows} x {columns} in blocks of {block}, without {sorted(missing) or 'weight'}"
            )
        if not np.allclose(parts["quant_map"].map(), bitsandbytes.values(kind), atol=1e-6):
            raise ValueError(f"a quant_map that is not {kind}'s")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} is not what bitsandbytes saves ({error!r}): quantize the model again") from error
    return Quantized4(
        name=where, weight=weight, parts=parts, kind=kind, shape_OI=(rows, columns), block=block,
        nested_block=nested_block, offset=offset, in_out=in_out,
    )  # fmt: skip


def assemble(
    entries: Sequence[Entry], holders: Sequence[Stored], path: str, place: Place, mesh: jax.sharding.Mesh
) -> Weight4 | Weight8:
    """The parameter `path` as a weight of few bits: `entries` are its matrices, `holders` their names, by layer."""
    index, size = holders[0].paths.index(path), holders[0].part_shape[-1]
    alike = [entry for entry in entries if isinstance(entry, LowBit) and type(entry) is type(entries[0])]
    if len(alike) < len(entries):
        raise UserError(f"{holders[0].name} and its like in other layers are not all quantized in one way")
    return alike[0].assemble(alike, slice(index * size, (index + 1) * size), place, mesh)


def _stack(contents, layers, shape, dtype, spec: PartitionSpec, mesh: jax.sharding.Mesh) -> jax.Array:
    """contents(layer) of each of `layers`, of `shape`, on the mesh; a device reads its own slice."""

    def read(layer: int, sharding: NamedSharding) -> jax.Array:
        found = contents(layers[layer])
        return jax.make_array_from_callback(shape, sharding, lambda index: np.array(found[index], dtype, order="C"))

    sharding = NamedSharding(mesh, PartitionSpec(None, *spec))
    return stacked((len(layers), *shape), np.dtype(dtype), sharding, read)
