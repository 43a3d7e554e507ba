"""Adapters as the folder that PEFT loads beside transformers' own model, compared with the live ones on the way.

Source: peft's `LoraConfig` and `LoraModel` (adapter_config.json, adapter_model.safetensors).

GPT-2 keeps q, k and v in one matrix (`c_attn`), and so its adapter is one: their A side by side, their B as blocks on
the diagonal, of a rank and an alpha as many times larger.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np

from meshgpt.convert import safetensor
from meshgpt.convert.atomic_folder import first, staged
from meshgpt.convert.gather import fetch
from meshgpt.convert.hf_names import ModelConfig, Stored, stored_tensors
from meshgpt.convert.tokenizer import save_carried
from meshgpt.data.tokenizer import Tokenizer
from meshgpt.distributed import processes
from meshgpt.errors import UserError
from meshgpt.models.lora import factors
from meshgpt.models.trainable import LoRA
from meshgpt.settings import json_text
from meshgpt.trees import Tree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Module:
    """A module of transformers' model that gets an adapter. parts: (place of its columns, adapter's parameter)."""

    stored: Stored
    parts: tuple[tuple[int, str], ...]

    @property
    def name(self) -> str:
        """As `named_modules` says it: `transformer.h.0.attn.c_attn`."""
        return self.stored.name.removesuffix(".weight")

    @property
    def kind(self) -> str:
        """Without the layer: `attn.c_attn`."""
        return self.name.split(".", 3)[3]


def export_adapter(
    params: Tree, part: LoRA, config: ModelConfig, base: str, out: Path, *, tokenizer: Tokenizer | None = None,
    replace: bool = False,
) -> str:  # fmt: skip
    """Writes `out`, which appears complete and compared, or not at all; gives the line that says what was proved.

    Args:
      params: adapters, as `LoRA.start` makes them.
      base: what PEFT is to take for the model, a Hugging Face folder or hub id.
      tokenizer: is saved beside them, with its special tokens and chat template, which a base may not have.
      replace: an earlier adapter at `out` gives way.

    Raises:
      UserError: `out` is taken, the disk too small, or a value is not finite.
    """
    modules = _modules(params, config)
    tensors = {name: array for module in modules for name, array in _tensors(module, params).items()}
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise UserError(f"{name} holds a value that is not finite: use an earlier step")
    total = sum(array.nbytes for array in tensors.values())
    with staged(out, total, marker=CONFIG, replace=replace) as folder:
        if first():
            shapes = [(name, array.shape) for name, array in tensors.items()]
            with safetensor.Writer(folder / WEIGHTS, shapes, np.dtype(np.float32)) as writer:
                for name, array in tensors.items():
                    writer.add(name, array)
            text = json_text(_config_json(modules, part, base), indent=2, sort_keys=True)
            (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
            if tokenizer is not None:
                save_carried(tokenizer, folder)
        processes.meet()
        for name, entry in safetensor.read_header(folder / WEIGHTS).items():
            if entry.map().tobytes() != tensors[name].tobytes():
                raise UserError(f"{folder / WEIGHTS}: {name} reads back as something else; not exported")
    numbers = sum(math.prod(array.shape) for array in tensors.values())
    return f"read back from disk: {numbers:,} parameters in {len(tensors)} tensors are equal"


def _modules(params: Tree, config: ModelConfig) -> list[_Module]:
    modules = []
    for stored in stored_tensors(config):
        parts = tuple((place, path) for place, path in enumerate(stored.paths) if _at(params, path) is not None)
        if parts:
            modules.append(_Module(stored=stored, parts=parts))
    return modules


def _at(params: Tree, path: str) -> dict | None:
    node = params
    for key in path.split("/"):
        node = node.get(key)
        if node is None:
            return None
    return node


def _tensors(module: _Module, params: Tree) -> dict[str, np.ndarray]:
    """lora_A (R, in) and lora_B (out, R) of a module."""
    rows, columns = module.stored.part_shape
    a_parts, b_parts = [], []
    for place, path in module.parts:
        adapter = _at(params, path)
        assert adapter is not None
        a, b = (np.asarray(fetch(leaf, module.stored.layer), np.float32) for leaf in factors(adapter))
        rank = a.shape[-1]
        a_parts.append(a.reshape(rows, rank).T)
        whole = np.zeros((columns * len(module.stored.paths), rank), np.float32)
        whole[place * columns : (place + 1) * columns] = b.reshape(rank, columns).T
        b_parts.append(whole)
    prefix = f"base_model.model.{module.name}"
    return {
        f"{prefix}.lora_A.weight": np.ascontiguousarray(np.concatenate(a_parts, axis=0)),
        f"{prefix}.lora_B.weight": np.ascontiguousarray(np.concatenate(b_parts, axis=1)),
    }


def _config_json(modules: list[_Module], part: LoRA, base: str) -> dict:
    kinds = {module.kind: module for module in modules}
    fused = {kind: len(module.parts) for kind, module in kinds.items() if len(module.parts) > 1}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": part.rank,
        "lora_alpha": part.alpha,
        "lora_dropout": part.dropout,
        "bias": "none",
        "fan_in_fan_out": not next(iter(kinds.values())).stored.transposed,
        "target_modules": sorted(kinds),
        "rank_pattern": {kind: count * part.rank for kind, count in fused.items()},
        "alpha_pattern": {kind: count * part.alpha for kind, count in fused.items()},
    }
