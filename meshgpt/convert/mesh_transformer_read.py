"""Checkpoints of Mesh-Transformer-JAX, the program that GPT-J was trained with: their layout, and reading them.

`step_N/shard_S/P.npz` holds, for model shard S, the leaves of {"opt_state", "params", "step"} in the order of
`jax.tree.flatten` (Haiku's modules by name, so layer_10 before layer_2), cut into 16 files of about equally many.
The optimizer's state is [updates, first moments, second moments, steps of the schedule], or absent in a "slim" one.

Model parallelism there keeps a copy of what is replicated in every shard, and what the copies mean differs:
norms are those of shard 0; the biases of `fc_out` and of the embedding are added up over the shards, every one of them
with the same gradient. The embedding's bias is part of every row of our (and of Hugging Face's) embedding.

Source: `checkpoint.py`, `layers.py` and `transformer_shard.py` (`CausalTransformerShard`) of Mesh-Transformer-JAX.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np

from meshgpt.convert.hf_read import fitting
from meshgpt.convert.npz import Leaf, read_leaves, scalar
from meshgpt.convert.safetensor import DTYPES
from meshgpt.convert.tensors import Tensors
from meshgpt.errors import UserError
from meshgpt.models.gptj import GPTJConfig

FILES = 16  # a shard's leaves are cut into as many files, whatever their number
SETTINGS = "mesh_transformer.json"  # the training configuration, in checkpoints of ours
_EMBEDDING = "transformer.wte.weight"
_ROOT = "causal_transformer_shard/~"
_BLOCK_LEAVES, _OTHER_LEAVES = 10, 6
# What the released GPT-J 6B was trained with (`configs/6B_roto_256.json`); its checkpoint comes without.
_GPTJ_6B = {"layers": 28, "d_model": 4096, "n_heads": 16, "n_vocab": 50400, "seq": 2048, "pe_rotary_dims": 64}

Join = Literal["rows", "columns", "first", "sum", "mean"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a leaf of the layout goes: `tensor` by its Hugging Face name, and how the shards make it.

    rows, columns: slices along the first or the last axis of the (in, out) matrix. first: shard 0 has it, the other
    copies were never used. sum: each shard holds a part of the same shape.
    """

    module: str
    name: str
    tensor: str
    join: Join

    @property
    def is_embedding(self) -> bool:
        return self.tensor == _EMBEDDING

    @property
    def is_embedding_bias(self) -> bool:
        return self.is_embedding and self.name == "b"


def places(n_layers: int) -> list[Place]:
    """Every parameter's leaf, in the order of the files."""
    table: list[tuple[str, str, str, Join]] = [
        ("embedding_shard/~/linear", "b", _EMBEDDING, "sum"),
        ("embedding_shard/~/linear", "w", _EMBEDDING, "rows"),
        ("projection_shard/~/linear", "b", "lm_head.bias", "columns"),
        ("projection_shard/~/linear", "w", "lm_head.weight", "columns"),
        ("projection_shard/~/replicated_layer_norm", "offset", "transformer.ln_f.bias", "first"),
        ("projection_shard/~/replicated_layer_norm", "scale", "transformer.ln_f.weight", "first"),
    ]
    block: list[tuple[str, str, str, Join]] = [
        ("linear", "w", "attn.q_proj.weight", "columns"),
        ("linear_1", "w", "attn.v_proj.weight", "columns"),
        ("linear_2", "w", "attn.k_proj.weight", "columns"),
        ("linear_3", "w", "attn.out_proj.weight", "rows"),
        ("linear_4", "b", "mlp.fc_in.bias", "columns"),
        ("linear_4", "w", "mlp.fc_in.weight", "columns"),
        ("linear_5", "b", "mlp.fc_out.bias", "sum"),
        ("linear_5", "w", "mlp.fc_out.weight", "rows"),
        ("replicated_layer_norm", "offset", "ln_1.bias", "first"),
        ("replicated_layer_norm", "scale", "ln_1.weight", "first"),
    ]
    found = [
        Place(module=f"{_ROOT}/{module}", name=name, tensor=tensor, join=join) for module, name, tensor, join in table
    ]
    found += [
        Place(module=f"{_ROOT}/layer_{i}/~/{module}", name=name, tensor=f"transformer.h.{i}.{tensor}", join=join)
        for i in range(n_layers)
        for module, name, tensor, join in block
    ]
    return sorted(found, key=lambda place: (place.module, place.name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joined:
    """One stored tensor out of the shards' leaves.

    transposed: it is (out, in) in Hugging Face's format. added: the embedding's bias, whose parts every row gets, in
    float32.
    """

    leaf: Leaf
    join: Join
    transposed: bool
    added: Leaf | None = None

    @property
    def code(self) -> str:
        return self.leaf.code if self.added is None else "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self._whole[::-1] if self.transposed else self._whole

    @property
    def _whole(self) -> tuple[int, ...]:
        shape = self.leaf.shape
        if self.join == "rows":
            return (shape[0] * self.leaf.shards, *shape[1:])
        return (*shape[:-1], shape[-1] * self.leaf.shards) if self.join == "columns" else shape

    def map(self) -> np.ndarray:
        if self.join == "first":
            return self.leaf.read(0)
        if self.join in ("sum", "mean"):
            total = _sum(self.leaf) / (self.leaf.shards if self.join == "mean" else 1)
            return total.astype(DTYPES[self.code])
        whole = np.empty(self._whole, DTYPES[self.code])
        axis = 0 if self.join == "rows" else -1
        for part, shard in zip(np.split(whole, self.leaf.shards, axis), range(self.leaf.shards), strict=True):
            part[...] = self.leaf.read(shard)
        if self.added is not None:
            whole += _sum(self.added).astype(whole.dtype)
        return whole.T if self.transposed else whole


def _sum(leaf: Leaf) -> np.ndarray:
    total = np.zeros(leaf.shape, np.float64)
    for shard in range(leaf.shards):
        total += leaf.read(shard).astype(np.float64)
    return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam's state by the parameters' names: first and second moments, and the number of updates."""

    mu: Tensors
    nu: Tensors
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose leaves are all there; nothing large is read yet."""

    config: GPTJConfig
    tensors: Tensors
    adam: Adam | None
    step: int
    notes: tuple[str, ...]


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is a checkpoint of Mesh-Transformer-JAX, or a model directory with some."""
    if (folder / "config.json").is_file():
        return False
    return any((path / "shard_0").is_dir() for path in (folder, *folder.glob("step_*"))) or (folder / "params").is_dir()


def read(folder: Path) -> Checkpoint:
    """Opens the checkpoint `folder`, or the last one in it.

    Raises:
      UserError: a shard or file is missing, cut short or holds objects, or the architecture is not GPT-J's.
    """
    if (folder / "params").is_dir():
        raise UserError(
            f"{folder} is a checkpoint of CausalTransformerV2, which is another architecture than GPT-J (a gated MLP); "
            "supported: CausalTransformerShard's step_N/shard_*"
        )
    last = folder if (folder / "shard_0").is_dir() else _last(folder)
    leaves = read_leaves(last, FILES)
    n_layers, has_adam = _count(last, len(leaves))
    config, notes = _config(last, n_layers, leaves[-1].shards)
    table = places(n_layers)
    count = len(table)
    step = scalar(leaves[-1])
    tensors = fitting(_join(last, table, leaves[-count - 1 : -1], moments=False), config)
    adam = None
    if has_adam:
        mu = fitting(_join(last, table, leaves[1 : count + 1], moments=True), config)
        nu = fitting(_join(last, table, leaves[count + 1 : 2 * count + 1], moments=True), config)
        adam = Adam(mu=mu, nu=nu, count=scalar(leaves[0]))
    notes += [
        f"read step {step:,} of Mesh-Transformer-JAX from {leaves[-1].shards} shards, "
        + ("with its optimizer state" if adam is not None else "which hold no optimizer state"),
        "the embedding's bias was added to the embedding" + (", its moments are left behind" if adam else ""),
    ]
    return Checkpoint(config=config, tensors=tensors, adam=adam, step=step, notes=tuple(notes))


def _last(folder: Path) -> Path:
    steps = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return max(steps, key=lambda path: int(path.name.removeprefix("step_")))


def _count(folder: Path, leaves: int) -> tuple[int, bool]:
    """(layers, whether there is an optimizer state) by the number of leaves."""
    for copies, scalars in ((1, 1), (3, 3)):  # parameters and step; with Adam also two moments and two counts
        layers, rest = divmod(leaves - scalars - copies * _OTHER_LEAVES, copies * _BLOCK_LEAVES)
        if rest == 0 and layers > 0:
            return layers, copies == 3
    raise UserError(
        f"{folder} holds {leaves} arrays a shard. A GPT-J of L layers has {_BLOCK_LEAVES} L + {_OTHER_LEAVES + 1}, "
        f"with Adam's state {3 * _BLOCK_LEAVES} L + {3 * _OTHER_LEAVES + 3}: another architecture or optimizer"
    )


def _join(origin: Path, table: list[Place], leaves: list[Leaf], *, moments: bool) -> Tensors:
    """The tensors that `leaves` make. Of a moment, the parts of a sum are not added: each had the whole gradient."""
    entries: dict[str, Joined] = {}
    pairs = list(zip(table, leaves, strict=True))
    bias = next(leaf for place, leaf in pairs if place.is_embedding_bias)
    for place, leaf in pairs:
        if place.is_embedding_bias:
            continue
        entries[place.tensor] = Joined(
            leaf=leaf,
            join="mean" if moments and place.join == "sum" else place.join,
            transposed=not place.is_embedding,
            added=bias if place.is_embedding and not moments else None,
        )
    return Tensors(origin=str(origin), entries=entries)


def _config(folder: Path, n_layers: int, shards: int) -> tuple[GPTJConfig, list[str]]:
    file, settings = _settings(folder, n_layers)
    wanted = {"norm": "layernorm", "pe": "rotary", "layers": n_layers, "cores_per_replica": shards}
    for name, value in wanted.items():
        if settings.get(name, value) != value:
            raise UserError(f"{file}: {name} is {settings[name]!r}, and this checkpoint needs {value!r}")
    numbers = {name: settings.get(name) for name in _GPTJ_6B if name != "pe_rotary_dims"}
    for name, value in numbers.items():
        if type(value) is not int:
            raise UserError(f"{file}: {name} is {value!r}; a whole number is needed")
    width, heads = settings["d_model"], settings["n_heads"]
    config = GPTJConfig(
        vocab_size=settings["n_vocab"],
        n_positions=settings["seq"],
        n_layers=n_layers,
        n_heads=heads,
        d_model=width,
        d_ff=4 * width,
        rotary_dim=settings.get("pe_rotary_dims", width // max(heads, 1)),
    )
    return config, [f"sizes from {file}"]


def _settings(folder: Path, n_layers: int) -> tuple[str, dict[str, Any]]:
    """The training configuration beside the checkpoint or above it, and where it was found."""
    for file in sorted((*folder.glob("*.json"), *folder.absolute().parent.glob("*.json"))):
        entries = _json(file)
        if isinstance(entries, dict) and {"layers", "d_model", "n_heads"} <= entries.keys():
            return str(file), entries
    if n_layers == _GPTJ_6B["layers"]:  # any other width is refused with the tensors' shapes
        return "the released GPT-J 6B, for no configuration is with the checkpoint", _GPTJ_6B
    raise UserError(
        f"{folder} does not say how many heads its model has: put the configuration that it was trained with (a .json "
        "with layers, d_model, n_heads, n_vocab, seq, pe_rotary_dims) beside it"
    )


def _json(file: Path) -> Any:
    """What a file holds; None if it is not JSON, for the folder above may hold anything."""
    try:
        return json.loads(file.read_text())
    except ValueError:
        return None
