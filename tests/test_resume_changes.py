"""A run resumed with another optimizer, schedule, precision or batch size: its state, its data, and what it says."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from test_optim_states import SHAPES, gradients, largest_update, matrix, placed, rounded_by_blocks, rounded_by_rank1

from meshgpt import trees
from meshgpt.data.batch_sizes import BatchSizes
from meshgpt.data.mixture import Schedule, Source, Stage
from meshgpt.optim import codecs
from meshgpt.optim.adam import AdamState
from meshgpt.optim.config import (
    Adafactor,
    AdamW,
    AdamW4bit,
    AdamW8bit,
    Constant,
    Lion,
    Muon,
    Optimizer,
    Piece,
    Piecewise,
    learning_rate,
)
from meshgpt.optim.convert_state import carried, decoded, formats, same_state
from meshgpt.training.run_folder import RunFolder
from meshgpt.trees import Tree

MATRICES = ("wte_VD", "q_DNH", "o_NHD", "up_DF")
PLAIN = {"weight_decay": 0.0}


def steps(optim: Optimizer, state: Tree, params: Tree, numbers: range) -> tuple[Tree, Tree]:
    """(state, last update) after some steps on `test_optim_states`' gradients."""
    transformation, new = optim.transformation(), None
    with jax.numpy_dtype_promotion("standard"):
        update = jax.jit(lambda g, s: transformation.update(g, s, params, finite=jnp.asarray(True)))
        for number in numbers:
            new, state = update(placed(gradients(number)), state)
    return state, new


def moments(optim: Optimizer, state: Tree, params: Tree) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Both in float32, by parameter."""
    node = state[0]
    kept = formats(optim)
    return tuple(  # type: ignore[return-value]
        {
            name: np.asarray(jax.jit(decoded, static_argnums=(0, 1))(form, name, tree[name], params[name]))
            for name in SHAPES
        }
        for form, tree in zip(kept, (node.mu, node.nu), strict=True)
    )


def test_moments_go_round_through_every_format() -> None:
    """AdamW, 8 bits, 4 bits, AdamW: each has what the one before had, rounded as the papers round, and goes on."""
    with jax.set_mesh(tiny.mesh(2, 2, 2)):
        params = placed(gradients(99))
        optims = [AdamW(**PLAIN), AdamW8bit(**PLAIN), AdamW4bit(**PLAIN), AdamW(moment_dtype="bfloat16", **PLAIN)]
        state, _ = steps(optims[0], optims[0].transformation().init(params), params, range(3))
        for old, new in itertools.pairwise(optims):
            before = moments(old, state, params)
            state, said = carried(old, state, new, params)
            assert said == ["first moments: carried over", "second moments: carried over"]
            assert (int(state[0].count), int(state[0].nu_count)) == (3, 3)
            wanted = jax.eval_shape(new.transformation().init, params)
            assert jax.tree.structure(state) == jax.tree.structure(wanted)
            for (path, a), (_, b) in zip(*map(trees.leaves_with_names, (state, wanted)), strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype), path
                assert not a.ndim or jax.typeof(a).sharding.spec == b.sharding.spec, path
            for now, then, second in zip(moments(new, state, params), before, (False, True), strict=True):
                for name in MATRICES:
                    expected = matrix(name, then[name])
                    if isinstance(new, AdamW8bit):
                        codec = codecs.DYNAMIC_8_UNSIGNED if second else codecs.DYNAMIC_8
                        expected = rounded_by_blocks(expected, codec.values, 256)
                    elif isinstance(new, AdamW4bit):
                        four = rounded_by_blocks(expected, codecs.DYNAMIC_4.values, 128)
                        expected = rounded_by_rank1(expected) if second else four
                    elif not second:
                        expected = np.asarray(jnp.asarray(expected, jnp.bfloat16).astype(jnp.float32))
                    off = np.abs(matrix(name, now[name]) - expected) > 1e-5 * np.abs(expected) + 1e-9
                    assert off.mean() < 2e-3, (type(new).__name__, name, second)
                np.testing.assert_allclose(now["scale_D"], then["scale_D"], rtol=1e-2)
        last, carried_on = optims[-1], moments(optims[-1], state, params)
        _, update = steps(last, state, params, range(3, 4))
    for name in MATRICES:
        m, v = carried_on[0][name] / (1 - last.b1**3), carried_on[1][name] / (1 - last.b2**3)
        expected = adam_by_hand(last, m, v, (3, 3), np.asarray(gradients(3)[name]))
        tiny.assert_close(update[name], expected, 1e-4, name)


def adam_by_hand(optim: AdamW, m: np.ndarray, v: np.ndarray, counts: tuple[int, int], g: np.ndarray) -> np.ndarray:
    """The update, from means free of their start at zero."""
    (b1, b2), (t, s) = (optim.b1, optim.b2), counts
    m = b1 * m * (1 - b1**t) + (1 - b1) * g
    v = b2 * v * (1 - b2**s) + (1 - b2) * g * g
    update = (m / (1 - b1 ** (t + 1))) / (np.sqrt(v / (1 - b2 ** (s + 1))) + optim.eps)
    largest = largest_update(b1, b2, s + 1)
    return np.clip(update, -largest, largest)


@pytest.mark.parametrize(
    ("old", "new", "has_second"),
    [
        (AdamW(**PLAIN), AdamW(b1=0.8, b2=0.999, **PLAIN), True),
        (Lion(weight_decay=0.0), AdamW(**PLAIN), False),
        (Muon(**PLAIN), AdamW(**PLAIN), False),
    ],
    ids=["other decays", "from Lion", "from Muon"],
)
def test_the_first_update_afterwards_is_corrected_for_each_moment_s_own_start(
    old: Optimizer, new: AdamW, has_second: bool
) -> None:
    """In float64 from the gradients themselves: no jump, though one moment is three steps old and the other new."""
    with jax.set_mesh(tiny.mesh()):
        tree = {"blocks": placed(gradients(99))}
        transformation = old.transformation()
        state = transformation.init(tree)
        with jax.numpy_dtype_promotion("standard"):
            for number in range(3):
                grads = {"blocks": placed(gradients(number))}
                _, state = jax.jit(lambda g, s: transformation.update(g, s, tree, finite=jnp.asarray(True)))(
                    grads, state
                )
            state, said = carried(old, state, new, tree)
            after = new.transformation()
            grads = {"blocks": placed(gradients(3))}
            update, _ = jax.jit(lambda g, s: after.update(g, s, tree, finite=jnp.asarray(True)))(grads, state)
    assert said == [
        "first moments: carried over",
        f"second moments: {'carried over' if has_second else 'start at zero'}",
    ]
    for name in ("up_DF", "q_DNH"):
        decay = {AdamW: 0.9, Lion: 0.99, Muon: 0.95}[type(old)]
        g = [gradients(number)[name].astype(np.float64) for number in range(4)]
        weights = np.array([decay**2, decay, 1.0])
        m = sum(w * x for w, x in zip(weights, g, strict=False)) / weights.sum()
        second = np.array([0.95**2, 0.95, 1.0])
        v = sum(w * x * x for w, x in zip(second, g, strict=False)) / second.sum()
        expected = adam_by_hand(new, m, v if has_second else 0 * v, (3, 3 if has_second else 0), g[3])
        tiny.assert_close(update["blocks"][name], expected, 1e-4, name)


@pytest.mark.parametrize(
    "new", [Lion(), Muon(), Adafactor(), AdamW8bit(state_memory="pinned_host")], ids=lambda o: str(o)[:12]
)
def test_every_optimizer_goes_on_from_adam(new: Optimizer) -> None:
    old = AdamW()
    with jax.set_mesh(tiny.mesh(1, 2, 2)):
        params = {"blocks": placed(gradients(99))}
        state = old.transformation().init(params)
        first = jax.tree.map(lambda p: p + 1, state[0].mu)
        state = (AdamState(jnp.int32(5), first, state[0].nu, jnp.int32(5)), *state[1:])
        state, said = carried(old, state, new, params)
        wanted = jax.eval_shape(new.transformation().init, params)
        assert jax.tree.structure(state) == jax.tree.structure(wanted)
        said_of = {
            "Lion": "second moments: dropped",
            "Adafactor": "moments: Adafactor keeps them otherwise, and starts afresh",
        }
        assert said[-1] == said_of.get(type(new).__name__, "second moments: carried over")
        if isinstance(new, Lion):
            expected = (1 - new.b2**5) / (1 - old.b1**5)
            np.testing.assert_allclose(np.asarray(state[0].mu["blocks"]["up_DF"]), expected, rtol=1e-5)
        if isinstance(new, AdamW8bit):
            assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state[0].mu)} == {"pinned_host"}


def test_what_leaves_the_state_as_it_is() -> None:
    assert same_state(AdamW8bit(), AdamW8bit(peak_lr=1.0, schedule=Constant(), warmup_steps=3, weight_decay=0.3))
    assert not same_state(AdamW(), AdamW(b2=0.99))
    assert not same_state(AdamW(), AdamW(state_memory="pinned_host"))
    assert not same_state(AdamW(), AdamW8bit())


def test_batch_sizes() -> None:
    sizes = BatchSizes.constant(8).changed(5, 12).changed(9, 3)
    assert [sizes.at(step) for step in (0, 4, 5, 8, 9, 100)] == [8, 8, 12, 12, 3, 3]
    assert [sizes.before(step) for step in (0, 4, 5, 6, 9, 10)] == [0, 32, 40, 52, 88, 91]
    assert BatchSizes.from_json(json.loads(json.dumps(sizes.to_json()))) == sizes
    steps_of = [step for step in range(12) for _ in range(sizes.at(step))]
    assert [sizes.step_of(n) for n in range(len(steps_of))] == steps_of
    assert sizes.changed(7, 8) == BatchSizes(((0, 8), (5, 12), (7, 8)))  # from a checkpoint before the second change
    assert sizes.changed(5, 8) == BatchSizes.constant(8)
    assert BatchSizes.constant(8).changed(0, 4) == BatchSizes.constant(4)


def test_a_stage_of_a_mixture_ends_at_its_step_whatever_the_batches_were() -> None:
    stages = (
        Stage(sources=(Source(store="a", max_epochs=0), Source(store="b", max_epochs=0)), until_step=7),
        Stage(sources=(Source(store="b", max_epochs=0),)),
    )
    sizes = BatchSizes.constant(8).changed(5, 12)

    def located(sizes: BatchSizes, sequences: range) -> list[list[int]]:
        schedule = Schedule(stages, ("a", "b"), (10_000, 10_000), (100, 100), sizes)
        return [column.tolist() for column in schedule.locate(np.array(sequences))]

    assert located(sizes, range(40)) == located(BatchSizes.constant(8), range(40))  # what was seen stays as it was
    source, nth = located(sizes, range(100))
    assert set(source[40:64]) == {0, 1}  # steps 5 and 6 are 24 sequences of the first stage
    assert set(source[64:]) == {1}
    assert nth[64:] == list(range(32, 68))


def contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "run.lock"}


def rows_of(run: Path) -> dict[int, dict[str, Any]]:
    return {row["step"]: row for row in runs.rows(run)}


@pytest.mark.slow
def test_a_run_changes_its_optimizer_schedule_and_batch_on_the_way(here: runs.Here, tmp_path: Path) -> None:
    """Steps 1-5 with AdamW and 8 sequences, 6-12 in 8 bits with 24, 13-15 in 4 bits, then AdamW in bfloat16."""
    recipe = here.workshop.recipe(tmp_path, "gptj")
    text = recipe.read_text()
    run = tmp_path / "run"

    def go(steps: int, optim: str, *flags: object, **other: str) -> runs.Ended:
        changed = text.replace("AdamW(peak_lr=3e-3, warmup_steps=4)", optim)
        changed = changed.replace("import AdamW\n", "import AdamW, AdamW4bit, AdamW8bit, Constant\n")
        recipe.write_text(changed)
        settings = ("--run-dir", run, "--steps", steps, "--export", "none", "--samples.prompts", "--eval-every", 50)
        return here.train(recipe, *settings, *flags)

    assert go(5, "AdamW(peak_lr=3e-3, warmup_steps=4)").code == 0
    before = contents(run)
    eight = "AdamW8bit(peak_lr=2e-3, warmup_steps=0, schedule=Constant())"
    go(10, eight).refused("optim.type was 'AdamW', now 'AdamW8bit'", "--resume-with-changes")
    go(10, "AdamW(peak_lr=3e-3, warmup_steps=4)", "--seed", 1, "--resume-with-changes").refused("seed was 0, now 1")
    assert contents(run) == before
    ended = go(10, eight, "--resume-with-changes", "--global-batch", 24)
    assert ended.code == 0, ended
    for line in ("first moments: carried over", "second moments: carried over", "data: on at sequence 40, 24 a step"):
        assert line in ended.out, ended
    assert "resuming with optim.peak_lr 0.002 (was 0.003)" in ended.out
    # What was said once need not be said again.
    assert go(12, eight, "--global-batch", 24).code == 0
    four = "AdamW4bit(peak_lr=1e-3, warmup_steps=0, schedule=Constant())"
    halves = ("--precision.compute", "float16")
    assert go(15, four, "--global-batch", 24, "--resume-with-changes", *halves).code == 0
    last = "AdamW(peak_lr=5e-4, warmup_steps=0, schedule=Constant())"
    ended = go(20, last, "--global-batch", 24, "--resume-with-changes", "--precision.params", "bfloat16")
    assert "parameters: now in bfloat16" in ended.out, ended
    rows = rows_of(run)
    rates = [rows[step]["learning_rate"] for step in (5, 6, 12, 13, 15, 16, 20)]
    assert rates[1:] == pytest.approx([2e-3, 2e-3, 1e-3, 1e-3, 5e-4, 5e-4])
    losses = [rows[step]["loss"] for step in range(1, 21)]
    assert np.isfinite(losses).all()
    assert max(np.diff(losses)[4:]) < 0.4  # no jump where the optimizer changes
    assert rows[20]["skipped_steps"] == 0
    assert [step for step, row in rows.items() if "loss_scale" in row] == [13, 14, 15]
    # Sequences go on where they were: 5 x 8, then 24 a step.
    assert [rows[step]["tokens"] for step in (5, 6, 20)] == [40 * 32, 64 * 32, (40 + 15 * 24) * 32]
    record = json.loads((run / "run.json").read_text())
    assert record["batch_sizes"] == [[0, 8], [5, 24]]
    assert [entry["step"] for entry in record["history"]] == [5, 12, 15]
    assert record["history"][0]["changes"]["optim.type"] == ["AdamW", "AdamW8bit"]
    assert record["history"][0]["sequences"] == 40
    assert RunFolder(run).batch_sizes().before(20) == 400
    shown = here.cli("data", "show", run, "--step", 6, "--row", 0)
    unchanged = tmp_path / "unchanged"
    recipe.write_text(text)
    assert here.train(recipe, "--run-dir", unchanged, "--steps", 6, "--export", "none", "--samples.prompts").code == 0
    same = here.cli("data", "show", unchanged, "--step", 6, "--row", 0)  # sequence 40 in both
    assert shown.out == same.out
    assert (
        here.cli("data", "order", run, "--to-step", 5).out == here.cli("data", "order", unchanged, "--to-step", 5).out
    )


def test_a_mid_run_switch_of_gpt2_medium_4096() -> None:
    """Its card: float16, AdamW up to 4e-4, then a constant 9e-5 with the optimizer in 8 bits; shapes alone."""
    config = dataclasses.replace(tiny.GPT2_124M, n_layers=26, n_heads=16, d_model=1024, n_positions=4096)
    cooling = Piecewise(start=0.15, pieces=(Piece(steps=3_000, to=1.0), Piece(steps=44_600, to=0.95, shape="cosine")))
    old = AdamW(peak_lr=4e-4, schedule=cooling)
    new = AdamW8bit(peak_lr=9e-5, warmup_steps=0, schedule=Constant())
    assert float(learning_rate(old, 51_650)(0)) == pytest.approx(6e-5, rel=1e-3)
    assert float(learning_rate(old, 51_650)(47_600)) == pytest.approx(3.8e-4, rel=1e-3)
    assert float(learning_rate(new, 51_650)(47_600)) == pytest.approx(9e-5)
    with jax.set_mesh(tiny.mesh()):
        params = tiny.model(config).abstract_params()
        state = jax.eval_shape(old.transformation().init, params)
        after = jax.eval_shape(lambda state, params: carried(old, state, new, params)[0], state, params)
        wanted = jax.eval_shape(new.transformation().init, params)
    assert trees.count(params) > 379e6
    forms = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)] for tree in (after, wanted)]
    assert forms[0] == forms[1]
