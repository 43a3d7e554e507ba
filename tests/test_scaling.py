"""Counts and FLOPs against PyTorch's models, published numbers and jax's own table of devices."""

import subprocess
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTJConfig, GPTJForCausalLM

from meshgpt.config import Data, Run
from meshgpt.models.flops import GPTJ_6B, count_parameters, explain_parameters, flops_per_token, mfu, peak_flops
from meshgpt.models.gpt2 import GPT2Config as OurGPT2Config
from meshgpt.models.trainable import LastLayers, LoRA
from meshgpt.training.program import flops_per_token as flops_per_token_of

T = 1024


def block_shapes(layers: int, d: int, heads: int, f: int) -> dict[str, tuple[int, ...]]:
    """The part of docs/architecture.md's table that both families share."""
    head = d // heads
    table = {
        "ln_1/scale_D": (d,),
        "ln_1/bias_D": (d,),
        **{f"attn/{name}_DNH": (d, heads, head) for name in "qkv"},
        "attn/o_NHD": (heads, head, d),
        "mlp/up_DF": (d, f),
        "mlp/up_bias_F": (f,),
        "mlp/down_FD": (f, d),
        "mlp/down_bias_D": (d,),
    }
    return {f"blocks/{name}": (layers, *shape) for name, shape in table.items()}


def gpt2_shapes(vocab=50304, positions=1024, layers=12, d=768, heads=12) -> dict[str, tuple[int, ...]]:
    return {
        "wte_VD": (vocab, d),
        "wpe_SD": (positions, d),
        **block_shapes(layers, d, heads, 4 * d),
        **{f"blocks/attn/{name}_bias_NH": (layers, heads, d // heads) for name in "qkv"},
        "blocks/attn/o_bias_D": (layers, d),
        "blocks/ln_2/scale_D": (layers, d),
        "blocks/ln_2/bias_D": (layers, d),
        "ln_f/scale_D": (d,),
        "ln_f/bias_D": (d,),
    }


def gptj_shapes(vocab=50432, layers=28, d=4096, heads=16) -> dict[str, tuple[int, ...]]:
    return {
        "wte_VD": (vocab, d),
        **block_shapes(layers, d, heads, 4 * d),
        "ln_f/scale_D": (d,),
        "ln_f/bias_D": (d,),
        "head_VD": (vocab, d),
        "head_bias_V": (vocab,),
    }


def torch_count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_gpt2_124m_has_the_parameters_of_pytorch():
    counts = count_parameters(gpt2_shapes(), 50257)
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    assert counts.total == torch_count(model) == 124_439_808
    assert counts.embedding + counts.blocks + counts.head == counts.total
    assert counts.padding == (50304 - 50257) * 768
    assert counts.blocks == torch_count(model.transformer.h)
    assert counts.head == torch_count(model.transformer.ln_f)


def test_gptj_6b_has_the_parameters_of_pytorch():
    counts = count_parameters(gptj_shapes(), 50400)
    with torch.device("meta"):
        model = GPTJForCausalLM(GPTJConfig())
    assert counts.total == torch_count(model) == GPTJ_6B
    assert counts.blocks == torch_count(model.transformer.h)
    assert counts.padding == (50432 - 50400) * (2 * 4096 + 1)


def test_the_matmul_weights_are_those_of_pytorchs_linear_layers():
    with torch.device("meta"):
        gptj, gpt2 = GPTJForCausalLM(GPTJConfig(n_layer=3)), GPT2LMHeadModel(GPT2Config())
    linear = sum(module.weight.numel() for module in gptj.modules() if isinstance(module, torch.nn.Linear))
    assert count_parameters(gptj_shapes(layers=3), 50400).matmul == linear
    matrices = [p.numel() for name, p in gpt2.named_parameters() if name.endswith("weight") and p.ndim == 2]
    assert count_parameters(gpt2_shapes(), 50257).matmul == sum(matrices) - 1024 * 768  # all but the positions


@pytest.mark.parametrize(("layers", "width", "heads"), [(2, 64, 4), (1, 96, 3)])
def test_flops_are_those_pytorch_counts_in_a_forward_and_backward_pass(layers, width, heads):
    # Of the backward pass PyTorch counts what it needs: all but the gradient for the embeddings, which are lookups.
    from torch.utils.flop_counter import FlopCounterMode

    config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, vocab_size=500, n_positions=32)
    model = GPT2LMHeadModel._from_config(config, attn_implementation="eager")
    tokens = torch.zeros((2, 32), dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens).logits.sum().backward()
    shapes = gpt2_shapes(vocab=512, positions=32, layers=layers, d=width, heads=heads)
    assert flops_per_token(shapes, 500, 32) * tokens.numel() == counter.get_total_flops()


@pytest.mark.parametrize("trainable", [LastLayers(layers=1), LastLayers(layers=2), LoRA()], ids=["1", "2", "lora"])
def test_what_a_frozen_part_saves_is_what_pytorch_saves(trainable):
    """LastLayers: only the last blocks and norm have gradients. LoRA: gradients go through everything frozen; what the
    adapters themselves take is left out."""
    from torch.utils.flop_counter import FlopCounterMode

    config = GPT2Config(n_layer=3, n_embd=64, n_head=4, vocab_size=500, n_positions=32)
    model = GPT2LMHeadModel._from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        trained = isinstance(trainable, LastLayers) and "ln_f" in name
        layer = int(name.split(".")[2]) if ".h." in name else -1
        parameter.requires_grad = trained or (isinstance(trainable, LastLayers) and layer >= 3 - trainable.layers)
    embedded = torch.zeros((2, 32, 64), requires_grad=isinstance(trainable, LoRA))
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded).logits.sum().backward()
    ours = OurGPT2Config(vocab_size=500, n_positions=32, n_layers=3, n_heads=4, d_model=64)
    run = Run(model=ours, data=Data(store="x"), init="x", trainable=trainable, steps=1, global_batch=1)
    assert flops_per_token_of(run) * 64 == counter.get_total_flops()


def test_flops_of_gpt2_follow_palm():
    matmul = 12 * 12 * 768**2 + 50257 * 768
    assert flops_per_token(gpt2_shapes(), 50257, T) == 6 * matmul + 12 * 12 * 768 * T


def test_mfu_is_that_of_the_measured_gptj_step():
    # A plain JAX step of GPT-J 6B took 582.3 ms for 4 x 2048 tokens on one H200.
    used = mfu(14_070, flops_per_token(gptj_shapes(), 50400, 2048), ["NVIDIA H200"])
    assert used == pytest.approx(0.55, abs=0.02)


def test_mfu_adds_up_devices_and_is_unknown_if_one_is():
    assert mfu(1e6, 312e6, ["NVIDIA A100-SXM4-40GB"] * 2) == pytest.approx(0.5)
    assert mfu(1e6, 312e6, ["NVIDIA A100-SXM4-40GB", "cpu"]) is None
    assert mfu(1e6, 312e6, []) is None


def test_the_published_count_of_gptj_is_explained():
    text = explain_parameters(gptj_shapes(), 50400)
    assert text.startswith("6,050,882,784 parameters")
    assert "6,053,381,344" in text
    assert "262,176 more pad" in text
    assert "Mesh-Transformer" not in explain_parameters(gpt2_shapes(), 50257)
    assert "pad" not in explain_parameters(gptj_shapes(vocab=50400), 50400)


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA L4", 121),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 3060", 25.5),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_peaks_of_gpus(kind, teraflops):
    assert peak_flops(kind) == teraflops * 1e12


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "",
        "NVIDIA GeForce RTX 3060 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H200 MIG 1g.18gb",
        "TPU v99",
    ],
)
def test_an_unknown_device_has_no_peak(kind):
    assert peak_flops(kind) is None


@pytest.mark.parametrize(
    ("kinds", "devices_a_chip", "teraflops_a_chip"),
    [
        (["TPU v2"], 2, 46),
        (["TPU v3"], 2, 123),
        (["TPU v4"], 1, 275),
        (["TPU v5 lite", "TPU v5e"], 1, 197),
        (["TPU v5", "TPU v5p"], 1, 459),
        (["TPU v6 lite", "TPU v6e"], 1, 918),
        (["TPU7x"], 2, 2307),
    ],
)
def test_peaks_of_tpus(kinds, devices_a_chip, teraflops_a_chip):
    for kind in kinds:
        assert peak_flops(kind) == teraflops_a_chip * 1e12 / devices_a_chip


def test_importing_it_does_not_bring_jax():
    code = "import sys, meshgpt.models.flops; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
