"""PyTorch's step, as a contestant: transformers' model or nanoGPT's, eager or compiled (see protocol.py).

torch_peer.py FOLDER transformers|nanogpt|nanogpt-no-bias eager|compiled [CHECKOUT]
"""

import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import protocol

Forward = Callable[[Any, Any], Any]  # (inputs, targets) to the mean loss


def from_transformers(folder: Path, told: dict, compiled: bool) -> tuple[Any, Any, Forward]:
    """The model, AdamW with decay of matrices only, and the forward pass with its loss."""
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(device(told)).train()
    if told["checkpointing"]:
        model.gradient_checkpointing_enable()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": told["weight_decay"]},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    betas = (told["b1"], told["b2"])
    adamw = torch.optim.AdamW(
        groups, lr=told["learning_rate"], betas=betas, eps=told["eps"], fused=device(told) == "cuda"
    )

    def forward(inputs: Any, targets: Any) -> Any:
        logits = model(inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.view(-1))

    return model, adamw, torch.compile(forward) if compiled else forward


def from_nanogpt(folder: Path, told: dict, compiled: bool, checkout: Path, bias: bool) -> tuple[Any, Any, Forward]:
    """nanoGPT's own model.py and optimizer, with the folder's weights: Conv1D's matrices are Linear's transposed."""
    import torch
    import transformers

    sys.path.insert(0, str(checkout))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sizes = theirs.config
    made = GPTConfig(
        block_size=sizes.n_positions, vocab_size=sizes.vocab_size, n_layer=sizes.n_layer, n_head=sizes.n_head,
        n_embd=sizes.n_embd, dropout=0.0, bias=bias,
    )  # fmt: skip
    model = GPT(made)
    turned = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    weights = theirs.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name].t() if name.endswith(turned) else weights[name])
    model.to(device(told)).train()
    adamw = model.configure_optimizers(
        told["weight_decay"], told["learning_rate"], (told["b1"], told["b2"]), device_type=device(told)
    )
    runs = torch.compile(model) if compiled else model
    return model, adamw, lambda inputs, targets: runs(inputs, targets)[1]


def device(told: dict) -> str:
    """Where ours runs; RuntimeError if this PyTorch cannot."""
    import torch

    if told["platform"] == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise RuntimeError(f"PyTorch {torch.__version__} finds no GPU, and ours runs on a {told['platform']}")
    return "cuda"


def main(folder: Path, kind: str, compiled: bool, checkout: Path) -> None:
    begun = time.perf_counter()
    import numpy as np
    import torch

    told = protocol.spec(folder)
    torch.set_num_threads(told["cores"])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    versions, at = protocol.versions_of("torch"), device(told)
    if kind == "transformers":
        model, adamw, run = from_transformers(folder, told, compiled)
        versions |= protocol.versions_of("transformers")
    else:
        model, adamw, run = from_nanogpt(folder, told, compiled, checkout, kind == "nanogpt")
        versions["model.py"] = "sha256 " + hashlib.sha256((checkout / "model.py").read_bytes()).hexdigest()[:12]
    parameters = list(model.parameters())
    tokens = torch.from_numpy(np.load(folder / "tokens.npy", allow_pickle=False)).long().to(at)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(told["dtype"])

    def step() -> float:
        with torch.autocast(at, half or torch.bfloat16, enabled=half is not None):
            loss = run(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, told["clip_norm"])
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.item()

    protocol.serve(step, begun, versions, torch.cuda.max_memory_allocated if at == "cuda" else None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "compiled", Path(sys.argv[4] if len(sys.argv) > 4 else ""))
