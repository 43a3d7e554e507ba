"""Weights of 4 and 8 bits as values: any mesh, inside compiled programs, beneath adapters, in every verb that reads."""

import dataclasses
import json
import os
from pathlib import Path

import hf_peers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import safetensors.numpy
from jax.sharding import PartitionSpec

from meshgpt.data.tokenizer import load_tokenizer
from meshgpt.distributed.mesh import spec
from meshgpt.models import bitsandbytes
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.quantized import Place, Weight4, Weight8

MESHES = [(1, 1, 1), (2, 2, 2), (1, 8, 1), (1, 1, 8)]
# As the parameters are: one axis of inputs and two of outputs, two and one, one and one.
PLACES = {
    "q_DNH": Place(shape=(64, 8, 16), inputs=1, spec=PartitionSpec("fsdp", "tensor", None)),
    "o_NHD": Place(shape=(8, 16, 64), inputs=2, spec=PartitionSpec("tensor", None, "fsdp")),
    "up_DF": Place(shape=(64, 128), inputs=1, spec=PartitionSpec("fsdp", "tensor")),
}


def rows(place: Place) -> np.ndarray:
    """A matrix (out, in)."""
    shape = int(np.prod(place.outer)), int(np.prod(place.inner))
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def as_parameter(x_OI: np.ndarray, place: Place) -> np.ndarray:
    return x_OI.T.reshape(place.shape)


def weight4(x_OI: np.ndarray, place: Place, kind: bitsandbytes.FourBit) -> Weight4:
    packed, absmax = bitsandbytes.pack4(x_OI, kind)
    block = place.block(64, jax.sharding.get_mesh())
    per_row = (*place.outer, x_OI.shape[1] // block)
    blocks = place.of_blocks()
    return Weight4(
        packed_OKg=jax.device_put(packed.reshape(*per_row, block // 2), PartitionSpec(*blocks, None)),
        absmax_OK=jax.device_put(np.repeat(absmax, 64 // block).reshape(per_row), blocks),
        kind=kind,
        place=place,
    )


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("mesh", MESHES)
def test_dense_is_bitsandbytes_numbers_on_every_mesh(name: str, mesh: tuple[int, int, int], on_mesh) -> None:
    place, x_OI = PLACES[name], rows(PLACES[name])
    expected = bitsandbytes.unpack4(*bitsandbytes.pack4(x_OI, "nf4"), "nf4", 64).reshape(x_OI.shape)
    with on_mesh(*mesh):
        found = jax.jit(lambda w: w.dense(jnp.dtype("float32")))(weight4(x_OI, place, "nf4"))
        assert jax.typeof(found).sharding.spec == place.spec
        np.testing.assert_array_equal(found, as_parameter(expected, place))
        codes, largest = bitsandbytes.rows8(x_OI)
        eight = Weight8(
            codes_OI=jax.device_put(codes.reshape(*place.outer, -1), place.of_blocks()),
            largest_O=jax.device_put(largest.reshape(place.outer), place.of_rows()),
            place=place,
        )
        found = jax.jit(lambda w: w.dense(jnp.dtype("float32")))(eight)
        np.testing.assert_allclose(found, as_parameter(bitsandbytes.unrows8(codes, largest), place), rtol=1e-6)


def test_values_are_rounded_once_to_the_compute_dtype(on_mesh) -> None:
    place = PLACES["up_DF"]
    with on_mesh(2, 2, 2):
        weight = weight4(rows(place), place, "fp4")
        exact = np.asarray(weight.dense(jnp.dtype("float32")))
        found = weight.dense(jnp.dtype("bfloat16"))
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(found), exact.astype(jnp.bfloat16))


def test_gradients_go_through_to_the_input(on_mesh) -> None:
    place = PLACES["up_DF"]
    with on_mesh(2, 2, 2):
        weight = weight4(rows(place), place, "nf4")
        x = jax.device_put(np.ones((4, 64), np.float32), spec("batch _"))

        def total(x: jax.Array) -> jax.Array:
            dense = jax.sharding.reshard(weight.dense(x.dtype), spec("_ mlp"))
            return jnp.sum(jnp.einsum("BD,DF->BF", x, dense, out_sharding=spec("batch mlp")))

        gradient = jax.jit(jax.grad(total))(x)
        np.testing.assert_allclose(np.asarray(gradient)[0], np.asarray(weight.dense(x.dtype)).sum(1), rtol=1e-4)


def test_a_stack_is_dense_as_its_layers_are(on_mesh) -> None:
    place = PLACES["o_NHD"]
    with on_mesh(2, 2, 2):
        one = weight4(rows(place), place, "nf4")
        stack = jax.tree.map(lambda a: jnp.stack([a, a]), one)
        found = jax.jit(jax.vmap(lambda w: w.dense(jnp.dtype("float32"))))(stack)
        np.testing.assert_array_equal(found[1], one.dense(jnp.dtype("float32")))


@pytest.fixture(scope="module")
def low(workshop: runs.Workshop) -> Path:
    """A small model in nf4, with the tokenizer of the workshop's store."""
    from meshgpt import cli

    config = GPT2Config(vocab_size=runs.VOCAB, n_positions=32, n_layers=2, n_heads=4, d_model=64)
    plain, folder = workshop.folder / "plain", workshop.folder / "nf4"
    hf_peers.peer(config).save_pretrained(plain)
    load_tokenizer(workshop.store / "tokenizer").save(plain)
    assert cli.main(["quantize", str(plain), "--format", "nf4", "--double-quant", "--out", str(folder)]) == 0
    return folder


def test_eval_and_generate_read_it(here: runs.Here, low: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(os.__file__).read_text()[:3000])
    found = {}
    for folder in (low, low.parent / "plain"):
        out = tmp_path / f"{folder.name}.json"
        assert here.cli("eval", folder, "--perplexity", text, "--out", out).code == 0
        found[folder.name] = json.loads(out.read_text())["results"]["text"]["bits_per_byte,none"]
    assert found["nf4"] == pytest.approx(found["plain"], rel=0.1)
    assert found["nf4"] != found["plain"]
    mesh = ("--mesh.data", "1", "--mesh.fsdp", "4", "--mesh.tensor", "2")
    greedy = ("--prompt", "def ", "--temperature", "0", "--max-new-tokens", "6")
    texts = [here.cli("generate", low, *greedy, *flags) for flags in ((), mesh)]
    assert all(ended.code == 0 for ended in texts)
    assert texts[0].out == texts[1].out


def test_export_dequantizes_it(here: runs.Here, low: Path, tmp_path: Path) -> None:
    ended = here.cli("export", low, "--out", tmp_path / "out")
    assert ended.code == 0, ended
    found = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    stored = safetensors.numpy.load_file(low / "model.safetensors")
    name = "transformer.h.1.mlp.c_proj.weight"
    state = json.loads(stored[f"{name}.quant_state.bitsandbytes__nf4"].tobytes())
    nested = bitsandbytes.Nested(
        codes_K=stored[f"{name}.absmax"], absmax=stored[f"{name}.nested_absmax"], offset=state["nested_offset"]
    )
    absmax = bitsandbytes.unnest(nested, bitsandbytes.nested_values(), 256)
    dense = bitsandbytes.unpack4(stored[name].ravel(), absmax, "nf4", 64).reshape(state["shape"]).T
    np.testing.assert_array_equal(found[name], dense)


def test_adapters_are_trained_beside_it(here: runs.Here, workshop: runs.Workshop, low: Path, tmp_path: Path) -> None:
    """QLoRA (Dettmers et al. 2023): the base stays in 4 bits, and what is exported is whole."""
    recipe = tmp_path / "qlora.py"
    text = workshop.recipe(tmp_path, "gpt2").read_text()
    text = text.replace(
        "from meshgpt.optim import", "from meshgpt.models.trainable import LoRA\nfrom meshgpt.optim import"
    )
    text = text.replace(
        "steps=20,", f"steps=6, init={str(low)!r}, trainable=LoRA(rank=4, targets=('attn/*', 'mlp/*')),"
    )
    recipe.write_text(text)
    mesh = ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2")
    ended = here.train(recipe, "--run-dir", tmp_path / "run", "--eval-every", "3", *mesh)
    assert ended.code == 0, ended
    values = [row["val_loss"] for row in runs.rows(tmp_path / "run") if row.get("val_loss")]
    assert values[-1] < values[0]
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
    assert here.cli("generate", tmp_path / "run", "--max-new-tokens", "2").code == 0


def test_places_tell_how_blocks_are_cut(on_mesh) -> None:
    with on_mesh(1, 8, 1):
        mesh = jax.sharding.get_mesh()
        assert PLACES["q_DNH"].block(64, mesh) == 8  # 64 inputs over 8 devices
        wide = dataclasses.replace(PLACES["q_DNH"], shape=(768, 8, 16))
        assert wide.block(64, mesh) == 32  # 96 inputs a device: blocks of 32 fit them and the file's
        assert PLACES["o_NHD"].block(64, mesh) == 64  # its inputs are not cut on this mesh
