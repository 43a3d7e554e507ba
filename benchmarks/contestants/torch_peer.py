"""PyTorch's step, as a contestant: transformers' model or nanoGPT's, eager or compiled (see protocol.py)."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import protocol

Forward = Callable[[Any, Any], Any]  # (inputs, targets) to the mean loss


def from_transformers(folder: Path) -> tuple[Any, Forward]:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def forward(inputs: Any, targets: Any) -> Any:
        logits = model(inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.view(-1))

    return model, forward


def from_nanogpt(folder: Path, checkout: str) -> tuple[Any, Forward]:
    """nanoGPT's own model.py, with the weights of the folder: Conv1D's matrices are Linear's transposed there."""
    import torch
    import transformers

    sys.path.insert(0, checkout)
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sizes = theirs.config
    made = GPTConfig(
        block_size=sizes.n_positions, vocab_size=sizes.vocab_size, n_layer=sizes.n_layer, n_head=sizes.n_head,
        n_embd=sizes.n_embd, dropout=0.0, bias=True,
    )  # fmt: skip
    model = GPT(made)
    turned = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    weights = theirs.state_dict()
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            if name in weights:
                parameter.copy_(weights[name].t() if name.endswith(turned) else weights[name])
    return model, lambda inputs, targets: model(inputs, targets)[1]


def main(folder: Path, kind: str, compiled: bool, checkout: str) -> None:
    begun = time.perf_counter()
    import numpy as np
    import torch

    told = protocol.spec(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(told["cores"])
    torch.backends.cuda.matmul.allow_tf32 = True
    model, forward = from_nanogpt(folder, checkout) if kind == "nanogpt" else from_transformers(folder)
    model.to(device).train()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": told["weight_decay"]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        groups, lr=told["learning_rate"], betas=(told["b1"], told["b2"]), eps=told["eps"], fused=device == "cuda"
    )
    tokens = torch.from_numpy(np.load(folder / "tokens.npy", allow_pickle=False)).long().to(device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    run = torch.compile(forward) if compiled else forward
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(told["dtype"])

    def step() -> float:
        with torch.autocast(device, half or torch.bfloat16, enabled=half is not None):
            loss = run(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, told["clip_norm"])
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.item()

    protocol.serve(step, begun, torch.cuda.max_memory_allocated if device == "cuda" else None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "compiled", sys.argv[4] if len(sys.argv) > 4 else "")
