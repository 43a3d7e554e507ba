"""How large a model is, what a token of training costs, and how fast a device could be at best.

Everything is computed from the shapes of the parameter tree (docs/architecture.md), so that one formula serves every
family and cannot disagree with the model: `{name: leaf.shape for name, leaf in leaves_with_names(params)}`.
Legend: V vocabulary, L layers, D d_model, N heads, H head size, T tokens of a sequence.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

Shapes = Mapping[str, Sequence[int]]

GPTJ_6B = 6_050_882_784
_MESH_TRANSFORMER_SHARDS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of parameters, without the rows that pad the vocabulary.

    total: all of them; a tied head counts once, with the embedding. embedding: token and position tables.
    blocks: the L layers. head: the final norm and, where it is not tied, the head.
    matmul: weights that multiply every token's activations, the matrices of the blocks and the head (a tied one too);
    Kaplan et al. 2020 calls those of the blocks N. padding: the parameters that are stored besides `total`.
    """

    total: int
    embedding: int
    blocks: int
    head: int
    matmul: int
    padding: int


def count_parameters(shapes: Shapes, vocab_size: int) -> Parameters:
    """Counts a parameter tree of GPT-2's or GPT-J's layout, given as {name: shape}.

    The capitals that end a name are its axes (`blocks/attn/q_DNH` is L D N H); V may be padded beyond `vocab_size`.
    """
    sizes = {name: _size(name, shape, vocab_size) for name, shape in shapes.items()}
    tables = {name for name in sizes if name.startswith(("wte_", "wpe_"))}
    blocks = {name for name in sizes if name.startswith("blocks/")}
    matrices = {name for name in sizes.keys() - tables if len(_axes(name)) > 1 and "bias" not in name}
    untied = any(name.startswith("head_") for name in matrices)
    total = sum(sizes.values())
    return Parameters(
        total=total,
        embedding=sum(sizes[name] for name in tables),
        blocks=sum(sizes[name] for name in blocks),
        head=sum(sizes[name] for name in sizes.keys() - tables - blocks),
        matmul=sum(sizes[name] for name in matrices) + (0 if untied else sizes["wte_VD"]),
        padding=sum(math.prod(shape) for shape in shapes.values()) - total,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forward:
    """Floating-point operations of a forward pass, a token: of the blocks' matrices, of attention and of the head."""

    blocks: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        return self.blocks + self.attention + self.head


def forward(shapes: Shapes, vocab_size: int, seq_len: int) -> Forward:
    """What `flops_per_token` counts of the forward pass: 2 M + 4 L (N H) T."""
    layers, _, heads, head_size = shapes["blocks/attn/q_DNH"]
    head = 2 * _size("wte_VD", shapes["wte_VD"], vocab_size)  # tied or not, V D
    matmul = 2 * count_parameters(shapes, vocab_size).matmul
    return Forward(blocks=matmul - head, attention=4 * layers * heads * head_size * seq_len, head=head)


def flops_per_token(shapes: Shapes, vocab_size: int, seq_len: int) -> int:
    """Floating-point operations that training on one token takes: 6 M + 12 L (N H) T.

    A multiplication and an addition count as two operations. M is `Parameters.matmul`: two operations a weight forward
    and four backward (Kaplan et al. 2020, section 2.1, whose N leaves out the head; here it counts, embedding lookups,
    norms and biases do not). Attention takes 4 N H T forward a layer (scores, then values) and twice that backward,
    over the whole T x T square although half of it is masked: the convention of PaLM (Chowdhery et al. 2022, appendix
    B), in which MFU figures are usually given; without the masked half it would be 6 L (N H) T, as in Kaplan's table 1.
    Recomputation (remat) and padding do not count: they are the implementation's cost, not the model's. So it is model
    FLOPs utilisation (MFU) that is reported; hardware FLOPs utilisation (HFU), which counts what is computed twice, is
    higher wherever remat is on. What of the backward pass a frozen part saves, and what a teacher's forward pass adds,
    `program.flops_per_token` counts.
    """
    return 3 * forward(shapes, vocab_size, seq_len).total


def mfu(tokens_per_second: float, flops_a_token: float, device_kinds: Sequence[str]) -> float | None:
    """Model FLOPs utilisation of all devices together, 0 to 1 (PaLM, appendix B); None where a peak is not known."""
    peaks = [peak_flops(kind) for kind in device_kinds]
    known = [peak for peak in peaks if peak is not None]
    if not known or len(known) < len(peaks):
        return None
    return tokens_per_second * flops_a_token / sum(known)


def explain_parameters(shapes: Shapes, vocab_size: int) -> str:
    """The count, its parts, and for GPT-J 6B why the published number is another one; lines for a reader."""
    counts = count_parameters(shapes, vocab_size)
    parts = (
        f"{counts.embedding:,} in embeddings, {counts.blocks:,} in blocks, {counts.head:,} in the final norm and head"
    )
    lines = [f"{counts.total:,} parameters: {parts}"]
    if counts.padding:
        lines.append(f"{counts.padding:,} more pad the vocabulary to a size that every mesh divides; they are not used")
    if counts.total == GPTJ_6B:
        norms, biases, embed = _kept_by_every_shard(shapes)
        extra = (_MESH_TRANSFORMER_SHARDS - 1) * (norms + biases) + _MESH_TRANSFORMER_SHARDS * embed
        lines.append(
            f"GPT-J is published with {counts.total + extra:,}: Mesh-Transformer-JAX trained it in "
            f"{_MESH_TRANSFORMER_SHARDS} shards and counted what each of them kept whole, {norms:,} of LayerNorms and "
            f"{biases:,} of MLP output biases, {_MESH_TRANSFORMER_SHARDS} times, and {_MESH_TRANSFORMER_SHARDS} copies "
            f"of an embedding bias of {embed:,} that is part of the embedding here"
        )
    return "\n".join(lines)


def _kept_by_every_shard(shapes: Shapes) -> tuple[int, int, int]:
    """What Mesh-Transformer-JAX replicates: elements of norms, of MLP output biases, and of its embedding bias."""
    norms = sum(math.prod(shape) for name, shape in shapes.items() if re.search(r"(^|/)ln_", name))
    return norms, math.prod(shapes["blocks/mlp/down_bias_D"]), shapes["wte_VD"][-1]


def _axes(name: str) -> str:
    """The axes that a parameter's name ends in, without the layers': DNH for `blocks/attn/q_DNH`."""
    return name.rsplit("_", 1)[-1]


def _size(name: str, shape: Sequence[int], vocab_size: int) -> int:
    """Elements of a parameter, its vocabulary axis as long as the vocabulary really is."""
    layers = len(shape) - len(_axes(name))
    return math.prod(shape[:layers]) * math.prod(
        vocab_size if axis == "V" else length for axis, length in zip(_axes(name), shape[layers:], strict=True)
    )


# Dense peak of one JAX device in FLOP/s, by `device_kind`: bfloat16 with float32 accumulation, or float16 where the
# device has no bfloat16 matrix unit (V100, T4). Figures given "with sparsity" are halved. A device of TPU v2, v3 and v7
# is one of a chip's two cores. Whole names only, since laptop chips, MIG slices and faster variants begin alike.
_PEAKS = (
    # Google Cloud's TPU pages, peak compute per chip: v4, v5e, v5p, v6e, TPU7x. v2 and v3: Jouppi et al. 2020, "A
    # Domain-Specific Supercomputer for Training Deep Neural Networks", table 3. Names: jax's own table of TPUs.
    (r"TPU v2", 46e12 / 2),
    (r"TPU v3", 123e12 / 2),
    (r"TPU v4", 275e12),
    (r"TPU v5 lite|TPU v5e", 197e12),
    (r"TPU v5|TPU v5p", 459e12),
    (r"TPU v6 lite|TPU v6e", 918e12),
    (r"TPU7x?|TPU v7x?", 2307e12 / 2),
    # NVIDIA's data sheets of V100, T4, A100, A10, A30, A40, L4, L40S, H100, H200, GH200, HGX B200.
    (r"Tesla V100-SXM\d.*", 125e12),
    (r"Tesla V100-PCIE.*", 112e12),
    (r"Tesla T4", 65e12),
    (r"(NVIDIA )?A100-(SXM4|PCIE)-\d+GB|NVIDIA A100 80GB PCIe", 312e12),
    (r"NVIDIA A10", 125e12),
    (r"NVIDIA A30", 165e12),
    (r"NVIDIA A40", 149.7e12),
    (r"NVIDIA L4", 121e12),
    (r"NVIDIA L40S", 362e12),
    (r"NVIDIA H100 80GB HBM3|NVIDIA H200|NVIDIA GH200 \d+GB", 989.4e12),
    (r"NVIDIA H100 PCIe", 756e12),
    (r"NVIDIA H100 NVL|NVIDIA H200 NVL", 835.5e12),
    (r"NVIDIA B200", 2250e12),
    # Whitepapers of GA102 (RTX 3090) and Ada (RTX 4090), float32 accumulation. The RTX 3060 is in neither: its 28
    # multiprocessors at 1.777 GHz do 512 operations a cycle each, as the RTX 3090's 82 do at 1.695 GHz.
    (r"NVIDIA GeForce RTX 3060", 25.5e12),
    (r"NVIDIA GeForce RTX 3090", 71e12),
    (r"NVIDIA GeForce RTX 4090", 165.2e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense 16-bit peak of one device in FLOP/s, given `jax.Device.device_kind`; None where it is not known."""
    return next((peak for pattern, peak in _PEAKS if re.fullmatch(pattern, device_kind)), None)
