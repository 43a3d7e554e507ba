"""Checkpoints of Mesh-Transformer-JAX, in and out: synthetic ones of its true layout, at small width."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from hf_peers import MESH, ONE, assert_equal_trees, live, mtj_logits, mtj_shards, our_logits, peer, write_mtj

from meshgpt import convert, trees
from meshgpt.distributed.mesh import MeshShape, spec
from meshgpt.errors import UserError
from meshgpt.models.gptj import GPTJConfig
from meshgpt.models.model import Model
from meshgpt.objectives.loss import NextToken, next_token_loss
from meshgpt.optim.adam import AdamState
from meshgpt.optim.config import AdamW
from meshgpt.training.step import from_params, make_train_step

# Eleven layers, because layer_10 comes before layer_2.
CONFIG = GPTJConfig(
    vocab_size=64, n_positions=16, n_layers=11, n_heads=8, d_model=32, d_ff=128, rotary_dim=2, vocab_multiple=128
)
UNPADDED = dataclasses.replace(CONFIG, vocab_multiple=64)
SETTINGS = {
    "layers": 11,
    "d_model": 32,
    "n_heads": 8,
    "n_vocab": 64,
    "norm": "layernorm",
    "pe": "rotary",
    "pe_rotary_dims": 2,
    "seq": 16,
}
COUNTS = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def model():
    """A GPT-J of transformers whose weights lie on a grid on which sums of a few are exact."""
    other = peer(CONFIG)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.round(parameter * 256) / 256)
    return other


@pytest.fixture(scope="module")
def checkpoints(model, tmp_path_factory):
    """Shard count to (folder, the shards): the same model and the same optimizer state."""
    folder, found = tmp_path_factory.mktemp("mtj"), {}
    rng = np.random.default_rng(3)
    for count in COUNTS:
        shards = mtj_shards(model, count, rng)
        mu = [jax.tree.map(lambda x: x / 2, tree) for tree in moments_of(shards)]
        nu = [jax.tree.map(lambda x: x * x, tree) for tree in moments_of(shards)]
        write_mtj(folder / str(count) / "step_7", shards, 7, (mu, nu))
        (folder / str(count) / "6B.json").write_text(json.dumps(SETTINGS | {"cores_per_replica": count}))
        found[count] = folder / str(count), shards
    return found


def moments_of(shards):
    """Something of the shape of the shards that is equal wherever a gradient is: the parts of a sum have one."""
    first = {module: leaf.get("b") for module, leaf in shards[0].items()}
    equal = [module for module in first if module.endswith(("linear_5", "embedding_shard/~/linear"))]
    return [
        {m: leaf | ({"b": np.arange(32, dtype=np.float32)} if m in equal else {}) for m, leaf in s.items()}
        for s in shards
    ]


@pytest.mark.parametrize("count", COUNTS)
def test_logits_are_those_of_the_sharded_computation(checkpoints, model, count):
    folder, shards = checkpoints[count]
    source = convert.open_source(str(folder))
    assert (source.config, source.step) == (CONFIG, 7)
    assert any(f"from {count} shards, with its optimizer state" in note for note in source.notes)
    params, probe = live(source.config, MESH)
    ours = our_logits(source.load(params), probe, CONFIG)
    theirs = np.stack([mtj_logits(shards, CONFIG, tokens_T) for tokens_T in probe.tokens_BT])
    np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=0)
    with torch.no_grad():
        other = model(torch.tensor(probe.tokens_BT, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(theirs, other, atol=2e-4, rtol=0)


def test_every_shard_count_gives_the_same_bits_on_every_mesh(checkpoints):
    found = {}
    for count, mesh in zip(COUNTS, (ONE, MESH, MeshShape(data=2, fsdp=4), MeshShape(data=1, tensor=8)), strict=True):
        params, _ = live(CONFIG, mesh)
        source = convert.open_source(str(checkpoints[count][0] / "step_7"))
        moments = source.load_moments(params, params)
        assert moments.count == 7
        loaded = {"params": source.load(params), "mu": moments.mu, "nu": moments.nu}
        assert jax.tree.leaves(loaded["mu"])[0].sharding == jax.tree.leaves(params)[0].sharding
        found[count] = jax.tree.map(np.asarray, loaded)
    for count in COUNTS[1:]:
        assert_equal_trees(found[count], found[1])
    out_bias = found[8]["mu"]["blocks"]["mlp"]["down_bias_D"]
    np.testing.assert_array_equal(out_bias, np.tile(np.arange(32) / 2, (11, 1)))
    np.testing.assert_array_equal(found[8]["nu"]["head_VD"], found[8]["params"]["head_VD"] ** 2)


def test_slim_bfloat16_checkpoint(model, tmp_path):
    bf16 = lambda tree: jax.tree.map(lambda x: np.asarray(x, jax.numpy.bfloat16), tree)  # noqa: E731
    for count in (2, 8):
        shards = [bf16(tree) for tree in mtj_shards(model, count, np.random.default_rng(0))]
        write_mtj(tmp_path / f"{count}", shards, 3)
        (tmp_path / f"{count}" / "c.json").write_text(json.dumps(SETTINGS))
        source = convert.open_source(str(tmp_path / f"{count}"))
        assert {entry.code for entry in source.tensors.entries.values()} == {"BF16", "F32"}
        params, _ = live(CONFIG)
        head = np.asarray(source.load(params)["head_VD"])[:64]
        np.testing.assert_array_equal(head, model.lm_head.weight.detach().bfloat16().float().numpy())
        with pytest.raises(UserError, match="no optimizer state"):
            source.load_moments(params, params)


def steps_of(params, opt_state, count):
    """`count` training steps from there on, on the mesh that is set."""
    model, optim = Model(config=UNPADDED), AdamW(peak_lr=1e-2, warmup_steps=0)
    state = from_params(params, optim)
    if opt_state is not None:
        state = dataclasses.replace(state, opt_state=opt_state(state.opt_state))
    step = jax.jit(make_train_step(next_token_loss(model, NextToken()), optim, 10, None))
    tokens = np.random.default_rng(5).integers(0, 64, (3, 1, 8, 9), dtype=np.int32)
    weights = jax.device_put(np.ones((1, 8, 8), np.float32), spec("_ batch seq"))
    for batch in tokens[3 - count :]:
        # The learning rate is the step's, and steps before were taken elsewhere.
        state = dataclasses.replace(state, step=jax.numpy.int32(2))
        state = step(state, jax.device_put(batch, spec("_ batch seq")), weights)[0]
        yield state


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 8])
def test_written_and_read_again_training_goes_on_bit_for_bit(tmp_path, shards):
    params, _ = live(UNPADDED, MESH)
    states = list(steps_of(params, None, 3))
    adam = states[1].opt_state[0]
    assert isinstance(adam, AdamState)
    moments = convert.Moments(mu=adam.mu, nu=adam.nu, count=int(adam.count))
    out = tmp_path / "step_2"
    convert.export_mtj(states[1].params, UNPADDED, out, shards=shards, step=2, moments=moments)
    source = convert.open_source(str(out))
    assert (source.config, source.step) == (CONFIG, 2)
    read = source.load_moments(params, params)
    assert_equal_trees(source.load(params), states[1].params)
    resumed = list(steps_of(source.load(params), read.into, 1))[-1]
    assert_equal_trees(resumed.params, states[2].params)
    assert int(resumed.opt_state[0].count) == 3


def test_what_is_written_computes_the_same_there(tmp_path):
    params, probe = live(CONFIG)
    for count in (2, 8):
        out = tmp_path / str(count)
        convert.export_mtj(params, CONFIG, out, shards=count)
        shards = [leaves_by_name(out / f"shard_{s}", CONFIG.n_layers) for s in range(count)]
        theirs = np.stack([mtj_logits(shards, CONFIG, tokens_T) for tokens_T in probe.tokens_BT[:2]])
        np.testing.assert_allclose(our_logits(params, probe, CONFIG)[:2], theirs, atol=2e-4, rtol=0)
        for shard in shards[1:]:  # its loader takes copies of a norm that differ from their start for parts of a sum
            norm = shard["causal_transformer_shard/~/layer_10/~/replicated_layer_norm"]
            assert (norm["scale"] == 1).all()
            assert (norm["offset"] == 0).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "8"]


def leaves_by_name(shard, n_layers):
    """The parameters in one shard's files, by the names that the program would give them."""
    leaves = [np.load(shard / f"{i}.npz", allow_pickle=False) for i in range(16)]
    values = iter([z[name] for z in leaves for name in z.files])
    named = {"w": 0}
    layer = {f"linear{n}": named for n in ("", "_1", "_2", "_3")} | {f"linear_{n}": named | {"b": 0} for n in (4, 5)}
    norm = {"replicated_layer_norm": {"scale": 0, "offset": 0}}
    modules = {f"layer_{i}": layer | norm for i in range(n_layers)}
    modules |= {
        "embedding_shard": {"linear": named | {"b": 0}},
        "projection_shard": {"linear": named | {"b": 0}} | norm,
    }
    skeleton = {
        f"causal_transformer_shard/~/{module}/~/{part}": leaf
        for module, parts in modules.items()
        for part, leaf in parts.items()
    }
    return jax.tree.map(lambda _: next(values), skeleton)


@pytest.fixture
def folder(model, tmp_path):
    """A checkpoint of two shards to be tampered with."""
    write_mtj(tmp_path / "step_7", mtj_shards(model, 2, np.random.default_rng(0)), 7)
    (tmp_path / "c.json").write_text(json.dumps(SETTINGS | {"cores_per_replica": 2}))
    return tmp_path


def refused(folder, message):
    with pytest.raises(UserError, match=message):
        convert.open_source(str(folder))


def test_missing_files_are_listed(folder):
    (folder / "step_7" / "shard_1" / "3.npz").unlink()
    (folder / "step_7" / "shard_0" / "15.npz").unlink()
    refused(folder, r"missing: shard_0/15.npz, shard_1/3.npz")


def test_missing_shard_is_refused(folder):
    (folder / "step_7" / "shard_1").rename(folder / "elsewhere")
    refused(folder, "cores_per_replica is 2, and this checkpoint needs 1")


def test_truncated_file_is_refused(folder):
    file = folder / "step_7" / "shard_1" / "4.npz"
    file.write_bytes(file.read_bytes()[:-30])
    refused(folder, r"shard_1/4.npz is cut short or broken")


def test_flipped_bit_is_refused(folder):
    file = folder / "step_7" / "shard_1" / "4.npz"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"shard_1/4.npz is cut short or broken"):
        convert.open_source(str(folder)).load(live(CONFIG)[0])


def test_objects_are_refused_and_not_unpickled(folder, tmp_path):
    made = tmp_path / "made"

    class Creating:
        def __reduce__(self):
            return open, (str(made), "w")

    for name in (4, 15):
        file = folder / "step_7" / "shard_0" / f"{name}.npz"
        np.savez(file, *np.load(file).values(), np.array([Creating()], object))
        refused(folder, r"shard_0/4.npz is cut short or broken \(it holds Python objects")
        assert not made.exists()


def test_shards_of_two_checkpoints_are_refused(folder):
    file = folder / "step_7" / "shard_1" / "4.npz"
    np.savez(file, np.zeros(3, np.float32))
    refused(folder, "shard_1/4.npz holds other arrays than")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "rmsnorm"}, "norm is 'rmsnorm', and this checkpoint needs 'layernorm'"),
        ({"pe": "t5"}, "pe is 't5'"),
        ({"layers": 12}, "layers is 12, and this checkpoint needs 11"),
        ({"cores_per_replica": 8}, "cores_per_replica is 8, and this checkpoint needs 2"),
        ({"n_vocab": 80}, r"shape: lm_head.bias is \(64,\), and the configuration says \(80,\)"),
        ({"seq": "16"}, "seq is '16'; a whole number"),
        ({"pe_rotary_dims": 3}, "rotary_dim=3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(folder, change, message):
    (folder / "c.json").write_text(json.dumps(SETTINGS | change))
    refused(folder, message)


def test_without_settings_the_heads_are_asked_for(folder):
    (folder / "c.json").write_text("{")
    refused(folder, "does not say how many heads")


def test_other_layouts_are_refused_by_name(folder):
    for i in range(16):
        for s in range(2):
            np.savez(folder / "step_7" / f"shard_{s}" / f"{i}.npz", np.zeros(3, np.float32))
    refused(folder, r"holds 16 arrays a shard. A GPT-J of L layers has 10 L \+ 7, with Adam's state 30 L \+ 21")
    (folder / "params").mkdir()
    refused(folder, "CausalTransformerV2, which is another architecture")


@pytest.mark.parametrize(
    ("change", "shards", "message"),
    [
        ({}, 3, "give a power of two"),
        ({}, 16, "16 shards do not divide n_heads=8"),
        ({"vocab_size": 63}, 2, "2 shards do not divide vocab_size=63"),
        ({"tied_head": True}, 2, "this model's is its embedding"),
        ({"d_ff": 64}, 2, "knows only d_ff = 4 d_model"),
    ],
)
def test_what_the_layout_cannot_hold_is_not_written(tmp_path, change, shards, message):
    with pytest.raises(UserError, match=message):
        convert.export_mtj({}, dataclasses.replace(CONFIG, **change), tmp_path / "out", shards=shards)
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_nothing_behind(tmp_path):
    params, _ = live(CONFIG)
    bad = trees.map_with_names(lambda name, x: x * np.float32(np.nan) if name == "ln_f/scale_D" else x, params)
    with pytest.raises(UserError, match=r"ln_f.weight holds a value that is not finite"):
        convert.export_mtj(bad, CONFIG, tmp_path / "out", shards=2)
    assert list(tmp_path.iterdir()) == []
