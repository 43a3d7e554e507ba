"""Recipes compiled for pods that are not here, by the real TPU compiler; and the reading of what it says."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from meshgpt import cli, recipe
from meshgpt.cli.compile import candidates, describe, expected, nearest, ranked, search
from meshgpt.config import Run
from meshgpt.distributed.mesh import MeshShape
from meshgpt.errors import UserError
from meshgpt.hardware import topologies
from meshgpt.models import flops
from meshgpt.models.attention_kernels import pick_kernel
from meshgpt.models.model import GPTJConfig, parameter_shapes
from meshgpt.planning import aot, hlo
from meshgpt.planning.aot import Proof, TooLargeError

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "configs/gptj_6b.py"
GPTJ_20B = GPTJConfig(n_layers=44, d_model=6144, n_heads=64, rotary_dim=24, vocab_multiple=512)


@pytest.fixture(scope="module", autouse=True)
def compiler() -> Iterator[None]:
    """The compiler, hurrying: peaks are within a few percent of those at full effort."""
    aot.quiet_compiler()
    aot.set_effort(low=True)
    yield
    aot.set_effort(low=False)


def gptj(**changes: object) -> Run:
    return dataclasses.replace(recipe.load(RECIPE), **changes)


def shallow(**changes: object) -> Run:
    return gptj(model=GPTJConfig(n_layers=2), **changes)


@pytest.mark.parametrize(
    ("name", "chips", "devices", "slices"),
    [
        ("v3-256", (8, 16), 256, 1),
        ("v3:8x16", (8, 16), 256, 1),
        ("v3-8", (2, 2), 8, 1),
        ("v4-384", (4, 4, 12), 192, 1),
        ("v4-512", (4, 8, 8), 256, 1),
        ("v5e-256", (16, 16), 256, 1),
        ("v5p-128", (4, 4, 4), 64, 1),
        ("V6E-256", (16, 16), 256, 1),
        ("2xv5e-256", (16, 16), 512, 2),
        ("h100x8", (8,), 8, 1),
    ],
)
def test_names_of_slices(name: str, chips: tuple[int, ...], devices: int, slices: int):
    topology = topologies.parse(name)
    assert (topology.chips, topology.device_count, topology.slices) == (chips, devices, slices)
    assert topologies.parse(topology.name) == topology


def test_every_name_is_its_own_and_wraps_where_whole_cubes_or_pods_are():
    assert len(set(topologies.names())) == len(topologies.names())
    for name in topologies.names():
        assert topologies.parse(name).name == name
    assert topologies.parse("v5p-128").wrap == (True, True, True)
    assert topologies.parse("v5p-64").wrap == (False, False, False)
    assert topologies.parse("v5e-128").wrap == (False, True)
    assert topologies.parse("v3-256").wrap == (False, False)
    assert topologies.parse("v3-2048").wrap == (True, True)


@pytest.mark.parametrize(
    ("name", "near"), [("v3-200", "v3-256"), ("v5e-300", "v5e-256"), ("v4:8x8x5", "v4-"), ("h100x5", "h100x4"),
                       ("3xv5p-100", "v5p-128"), ("tpu", "v3-256"), ("", "v3-256"), ("v5e-512", "v5e-256")]
)  # fmt: skip
def test_a_topology_that_the_table_lacks_is_refused_with_the_nearest(name: str, near: str):
    with pytest.raises(UserError, match="no such slice can be rented; the nearest are") as refused:
        topologies.parse(name)
    assert near in str(refused.value)


PROGRAM = """HloModule step
%cond (p: (s32[])) -> pred[] {
  %c = s32[] constant(28)
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}
%all-reduce-scatter.1 (p: f32[64]) -> f32[8] {
  %ar.1 = f32[64]{0} all-reduce(%p), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
}
%body (p: (s32[])) -> (s32[]) {
  %g.1 = bf16[8,16]{1,0:T(8,128)} all-gather(%x), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %g.2 = (bf16[2,16]{1,0}, bf16[8,16]{1,0}) all-gather-start(%x), replica_groups=mesh['a'=4,'b'=2] {'a'}
  %f.1 = f32[8] fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  %ar.2 = (bf16[4]{0}, f32[4]{0}) all-reduce(%a, %b), replica_groups=[4,2]<=[8], to_apply=%add
  %cp.1 = f32[10]{0} collective-permute(%a), source_target_pairs={{0,2},{2,4},{4,6},{6,0}}
  %one.1 = f32[10]{0} all-reduce(%a), replica_groups={{0},{1}}, to_apply=%add
}
%dead (p: f32[]) -> f32[] {
  %ar.9 = f32[10]{0} all-reduce(%a), replica_groups={{0,1}}, to_apply=%add
}
ENTRY %main (p: f32[]) -> f32[] {
  %w.1 = (s32[]) while(%t), condition=%cond, body=%body
  %ar.3 = f32[] all-reduce(%n), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %k.1 = bf16[8] custom-call(%n), custom_call_target="tpu_custom_call"
}
"""


def test_collectives_are_read_with_axes_bytes_and_turns():
    found = {(c.kind, c.axes, c.devices, c.size, c.moved, c.times)
             for c in hlo.collectives(PROGRAM, {"data": 1, "fsdp": 4, "tensor": 2})}  # fmt: skip
    assert found == {
        ("all-gather", "fsdp", 4, 256, 192, 28),  # both forms of the same
        ("reduce-scatter", "fsdp", 4, 256, 192, 28),
        ("all-reduce", "tensor", 2, 24, 24, 28),
        ("collective-permute", "fsdp", 2, 40, 40, 28),
        ("all-reduce", "fsdp+tensor", 8, 4, 7, 1),
    }
    assert hlo.kernels(PROGRAM) == ["tpu_custom_call"]


def argument_bytes(proof: Proof) -> float:
    """Parameters and two moments in float32, each device its slice; biases and norms by what shards them; the batch.

    A TPU keeps rows of 128: heads of 96, cut over 64 devices into slices of 96, take a third more.
    """
    model, mesh, run = proof.run.model, proof.mesh, proof.run
    L, D, F, V = model.n_layers, model.d_model, model.mlp_width, model.padded_vocab
    rows_of_128 = min(math.ceil(width / 128) * 128 / width for width in (model.head_size, D // mesh.fsdp))
    matrices = (rows_of_128 * 4 * L * D * D + 2 * L * D * F + 2 * V * D) / (mesh.fsdp * mesh.tensor)
    rest = L * 2 * D + L * D + (L * F + V) / mesh.tensor + 2 * D
    rows = run.global_batch / mesh.batch_shards
    return 3 * 4 * (matrices + rest) + 4 * rows * (2 * run.sequence_length + 1)


def check(proof: Proof, kernel: str) -> None:
    memory = proof.memory
    assert memory.peak <= 0.95 * memory.limit
    # Not less, and a little more: arrays are padded to whole tiles of 8 x 128.
    assert argument_bytes(proof) <= memory.arguments <= 1.005 * argument_bytes(proof)
    assert memory.arguments < memory.peak
    assert proof.kernel == kernel
    model = proof.run.model
    # The largest thing that is ever sent at once is a device's part of the embedding, or of one layer.
    layer = 2 * 12 * model.d_model**2 / proof.mesh.tensor
    table = 4 * model.padded_vocab * model.d_model / proof.mesh.tensor
    rows = proof.run.global_batch / proof.run.accumulate / proof.mesh.batch_shards
    activations = 2 * 2 * rows * proof.run.sequence_length * model.d_model
    assert max(one.size for one in proof.collectives) <= 1.15 * max(layer, table, activations)
    gathered = sum(one.moved * one.times for one in proof.collectives if one.kind == "all-gather")
    # Each microbatch gathers every layer twice: forward, and again for the backward pass.
    assert gathered >= 0.9 * 2 * proof.run.accumulate * layer * model.n_layers * (proof.mesh.fsdp - 1) / proof.mesh.fsdp
    assert 0 < proof.estimate.best <= proof.estimate.worst
    assert proof.flops_per_token == flops.flops_per_token(parameter_shapes(model), model.vocab_size, 2048)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kernel"),
    [("v3-256", "xla"), ("v4-512", "splash"), ("v5e-256", "splash"), ("v5p-128", "splash"), ("v6e-256", "splash")],
)
def test_gptj_6b_fits(name: str, kernel: str):
    proof = aot.prove(gptj(), topologies.parse(name))
    check(proof, kernel)
    assert proof.tokens_per_step == 512 * 2048
    text = describe(proof)
    for words in ("parameters", "peak", "margin", "all-gather", "fsdp", "tokens/s", "days", "assumed"):
        assert words in text


@pytest.mark.slow
def test_20b_fits_on_v3_512():
    """The shape of GPT-NeoX-20B, with head size 96."""
    proof = aot.prove(gptj(model=GPTJ_20B, accumulate=8), topologies.parse("v3-512"))
    check(proof, "xla")
    assert flops.count_parameters(parameter_shapes(GPTJ_20B), 50400).total == pytest.approx(20.5e9, rel=0.01)


@pytest.mark.slow
def test_slices_hold_whole_models_and_only_data_crosses_between_them():
    topology = topologies.parse("2xv5e-16")
    devices = aot.devices_of(topology)
    proof = aot.prove(shallow(mesh=MeshShape(data=2, fsdp=4, tensor=4), accumulate=1), topology)
    assert {"fsdp", "tensor"} <= {one.axes for one in proof.collectives}
    from meshgpt.distributed.mesh import make_mesh

    mesh = make_mesh(proof.mesh, devices)
    for index, slice_ in enumerate(mesh.devices):
        assert {device.slice_index for device in slice_.flat} == {index}
    with pytest.raises(UserError, match=r"2 slices need --mesh\.data 2"):
        aot.prove(shallow(mesh=MeshShape(data=1, fsdp=8, tensor=4)), topology)


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_the_shortfall_and_what_would():
    run, topology = shallow(mesh=MeshShape(data=1, fsdp=2, tensor=2), accumulate=8), topologies.parse("v5e-4")
    with pytest.raises(TooLargeError, match=r"it does not fit: at least [\d.]+ GiB on a device of v5e-4.*too much"):
        aot.prove(run, topology, hbm=3 << 30)
    with pytest.raises(TooLargeError):
        aot.prove(run, topology, hbm=1 << 30)
    found = search(run, topology, 2, lambda text: None)
    assert any(isinstance(outcome, Proof) for _, outcome in found)
    table = ranked(found).splitlines()
    assert table[0].split() == ["step", "peak", "GiB", "flags"]
    assert all("--mesh.data" in line and "--execution.remat" in line for line in table[1:])


def test_the_nearest_change_that_fits_is_named():
    tight = gptj(mesh=MeshShape(data=1, fsdp=-1, tensor=8), accumulate=1)
    said = nearest(tight, topologies.parse("v3-64"))
    assert "The nearest that should fit: --mesh.data" in said
    huge = gptj(model=GPTJ_20B, mesh=MeshShape(data=1, fsdp=-1, tensor=4))
    assert "take more devices" in nearest(huge, topologies.parse("v3-8"))


def test_candidates_keep_the_batch_and_match_the_devices():
    run, topology = gptj(), topologies.parse("2xv5e-256")
    found = list(candidates(run, topology))
    assert len(found) > 20
    for one in found:
        assert math.prod((one.mesh.data, one.mesh.fsdp, one.mesh.tensor)) == 512
        assert one.mesh.data % 2 == 0
        assert (one.global_batch, one.model, one.optim) == (run.global_batch, run.model, run.optim)
    seconds, size = expected(
        dataclasses.replace(run, mesh=MeshShape(data=1, fsdp=32, tensor=8)), topologies.parse("v3-256")
    )
    assert 2 < seconds < 20
    assert 0.5e9 < size < 4e9


def test_the_kernel_is_that_of_the_mesh_and_not_of_this_machine():
    from meshgpt.distributed.mesh import make_mesh

    for name, kernel in {"v3-8": "xla", "v5e-4": "splash", "v4-8": "splash"}.items():
        devices = aot.devices_of(topologies.parse(name))
        with jax.set_mesh(make_mesh(MeshShape(), devices)):
            bfloat16 = jax.numpy.dtype("bfloat16")
            assert pick_kernel("auto", bfloat16, 256, 2048) == kernel
            assert pick_kernel("auto", bfloat16, 96, 2048) == "xla"
            assert pick_kernel("auto", bfloat16, 256, 100) == "xla"
            with pytest.raises(UserError, match=r"execution.attention='cudnn'.*the backend is tpu"):
                pick_kernel("cudnn", bfloat16, 64)
            if kernel == "xla":
                with pytest.raises(UserError, match="it does not compile for TPU v3"):
                    pick_kernel("splash", bfloat16, 256, 2048)


def test_the_verb_prints_figures_and_names_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    small = tmp_path / "small.py"
    small.write_text(
        "from meshgpt.config import Data, Run\nfrom meshgpt.models.model import GPT2Config\n"
        "def config():\n    return Run(model=GPT2Config(n_layers=1, d_model=128, n_heads=2, n_positions=128), "
        "data=Data(), steps=1000, global_batch=8)\n"
    )
    flags = ["compile", str(small), "--topology", "v5e-4", "--effort", "low"]
    assert cli.main([*flags, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["devices"], said["attention"], said["mesh"]["data"]) == (4, "splash", 4)
    assert said["memory"]["peak"] > said["memory"]["parameters"]
    assert cli.main([*flags, "--json", "--data.mask-documents"]) == 0  # by segment ids, not by a T x T mask
    masked = json.loads(capsys.readouterr().out)
    assert masked["attention"] == "splash"
    assert masked["memory"]["peak"] < 1.1 * said["memory"]["peak"]
    for arguments, words in (
        (flags[:2], "--topology"),
        ([*flags, "--effort", "high"], "'high'"),
        ([*flags[:3], "v5e-5"], "no such slice can be rented"),
        ([*flags, "--mesh.tensor", "3"], "mesh data=-1 fsdp=1 tensor=3 needs a multiple of 3 devices"),
    ):
        try:
            code = cli.main(arguments)
        except SystemExit as end:  # of a value of another type
            code = end.code
        assert code == 2
        assert words in capsys.readouterr().err


def test_a_compiler_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    def missing(*arguments: object, **options: object) -> None:
        raise RuntimeError("no plugin")

    monkeypatch.setattr(aot.jax_topologies, "get_topology_desc", missing)
    for name, extra in (("v3-8", "tpu"), ("h100x8", "cuda12")):
        with pytest.raises(UserError, match=rf"cannot be loaded \(no plugin\).*meshgpt\[{extra}\]"):
            aot.devices_of(topologies.parse(name))
