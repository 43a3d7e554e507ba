"""What would make a parameter infinite or NaN is not taken and counted; and no setting is NaN or infinite."""

import dataclasses
import importlib
import inspect
import json
import math
import pkgutil
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import meshgpt
from meshgpt.config import from_json, to_json
from meshgpt.errors import UserError
from meshgpt.optim.config import AdamW, AdamW8bit, Constant, Cosine, Lion, Optimizer, Piece, Piecewise
from meshgpt.settings import json_text, refuse_non_finite
from meshgpt.training.step import TrainState, from_params, make_train_step


def push(params: dict, tokens: jax.Array, weights: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """A loss of 0 whose gradient is the tokens', however large the parameters are."""
    del key
    w = params["w_DF"].astype(jnp.float32)
    x = tokens[:, :-1].astype(jnp.float32)
    return (weights * x * (w - jax.lax.stop_gradient(w))).sum(), weights.sum()


def one_step(optim: Optimizer, at: float, dtype: str) -> tuple[TrainState, TrainState, dict[str, Any]]:
    with jax.set_mesh(tiny.mesh()):
        before = from_params({"w_DF": jnp.full((1, 3), at, dtype)}, optim)
        step = jax.jit(make_train_step(push, optim, 10, None))
        after, metrics = step(before, *tiny.batch(np.array([[1, 2, 3, 4]] * 2, np.int32)))
    return before, after, metrics


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", [AdamW, AdamW8bit, Lion])
def test_an_update_beyond_the_largest_number_is_not_taken(kind: type, dtype: str) -> None:
    largest = float(jnp.finfo(dtype).max)
    optim = kind(peak_lr=min(largest, 3e38) / 2, warmup_steps=0, schedule=Constant(), weight_decay=0.0)
    before, after, metrics = one_step(optim, -0.9 * largest, dtype)
    assert np.isfinite(float(metrics["loss"]))
    tiny.assert_same_bits(after.params, before.params)
    assert (int(metrics["skipped_steps"]), int(metrics["streak"])) == (1, 1)
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(after.opt_state))
    _, after, metrics = one_step(optim, 0.9 * largest, dtype)
    assert int(metrics["skipped_steps"]) == 0
    assert np.isfinite(np.asarray(after.params["w_DF"], np.float32)).all()


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_a_rate_that_overflows_is_not_taken_and_leaves_the_state() -> None:
    optim = AdamW(peak_lr=3e38, schedule=Piecewise(pieces=(Piece(steps=1, to=1e6, shape="constant"),)))
    before, after, metrics = one_step(optim, 0.0, "float32")
    assert not np.isfinite(float(metrics["learning_rate"]))
    tiny.assert_same_bits((after.params, after.opt_state), (before.params, before.opt_state))
    assert int(metrics["skipped_steps"]) == 1


def _settings() -> list[type]:
    """Every dataclass of the package with a number that a user may give by flag, recipe or JSON."""
    found = set()
    for module in pkgutil.walk_packages(meshgpt.__path__, "meshgpt."):
        if not module.name.endswith("__main__"):
            for cls in vars(importlib.import_module(module.name)).values():
                if isinstance(cls, type) and not inspect.isabstract(cls) and _is_looked_at(cls):
                    found.add(cls)
    return sorted(found, key=lambda cls: (cls.__module__, cls.__qualname__))


def _is_looked_at(cls: type) -> bool:
    code = getattr(getattr(cls, "__post_init__", None), "__code__", None)
    return code is not None and refuse_non_finite.__name__ in code.co_names


SETTINGS = _settings()


def _has_float(hint: Any) -> bool:
    return hint is float or any(_has_float(part) for part in typing.get_args(hint))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("cls", SETTINGS, ids=lambda cls: cls.__qualname__)
def test_no_field_takes_nan_or_infinity(cls: type, bad: float) -> None:
    hints = typing.get_type_hints(cls)
    fields = [field for field in dataclasses.fields(cls) if _has_float(hints[field.name])]
    for field in fields:
        given = object.__new__(cls)
        for other in dataclasses.fields(cls):
            object.__setattr__(given, other.name, None)
        for value in (bad, (bad,), {"a": bad}):
            object.__setattr__(given, field.name, value)
            with pytest.raises(UserError, match=rf"{field.name.replace('_', '.')}.*give a finite number"):
                given.__post_init__()


def test_a_run_holds_no_dataclass_that_is_not_looked_at() -> None:
    """Every part of a recipe, however deep, is made by `settings`."""
    from meshgpt.config import Run

    seen: set[type] = set()

    def visit(hint: Any) -> None:
        for part in typing.get_args(hint):
            visit(part)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type) and hint not in seen:
            seen.add(hint)
            for inner in typing.get_type_hints(hint).values():
                visit(inner)

    visit(Run)
    assert len(seen) > 20
    assert seen <= set(SETTINGS), seen - set(SETTINGS)


def test_clip_norm_says_what_infinity_is_called() -> None:
    with pytest.raises(UserError, match=r"optim\.clip_norm=inf: give a finite number; 0 never clips"):
        AdamW(clip_norm=math.inf)
    with pytest.raises(UserError, match=r"optim\.schedule\.final=nan"):
        Cosine(final=math.nan)
    with pytest.raises(UserError, match="above 0 that float32 can hold"):
        AdamW(peak_lr=1e-60)
    with pytest.raises(UserError, match="give a number in"):
        AdamW(b2=1 - 1e-12)


def test_infinity_in_a_run_json_is_refused() -> None:
    described = to_json(AdamW()) | {"eps": math.inf}
    with pytest.raises(UserError, match="finite"):
        from_json(AdamW, described)


def test_json_has_neither_nan_nor_infinity() -> None:
    value = {"a": [1.0, math.nan, (math.inf, {"b": -math.inf})], "c": 3}
    assert json.loads(json_text(value)) == {"a": [1.0, None, [None, {"b": None}]], "c": 3}
    refuse_non_finite(AdamW())
