"""Documents side by side in a row: as if each stood alone, by value and by gradient, on every mesh."""

import dataclasses
import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshgpt.config import Data, Run
from meshgpt.distributed.mesh import spec
from meshgpt.errors import UserError
from meshgpt.models import layers
from meshgpt.models.layers import Execution
from meshgpt.models.model import GPT2Config, GPTJConfig, Model
from meshgpt.objectives.document_mask import Isolation, prove_isolation
from meshgpt.training import loop as loop_module

END = 5
GPT2 = GPT2Config(vocab_size=50, n_positions=32, n_layers=2, n_heads=2, d_model=16)
GPTJ = GPTJConfig(vocab_size=50, n_positions=32, n_layers=2, n_heads=2, d_model=16, rotary_dim=4)
SINGLE = (1, 1, 1)
CASES = pytest.mark.parametrize(("mesh", "config"), [(SINGLE, GPT2), ((2, 2, 2), GPTJ)], ids=["gpt2", "gptj"])


def rows(batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Rows whose documents begin in different places, some at once, some never."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(6, 50, (batch, length))
    tokens[rng.random((batch, length)) < 0.15] = END
    tokens[0], tokens[1, 0] = rng.integers(6, 50, length), END
    return tokens.astype(np.int32)


def placed(tokens: np.ndarray) -> jax.Array:
    return jax.device_put(tokens, spec("batch seq"))


@CASES
def test_each_document_is_computed_as_if_alone(on_mesh, mesh: tuple[int, int, int], config):
    tokens = rows(4, 24)
    model = Model(config=config)
    with on_mesh(*mesh):
        params = jax.jit(model.init)(jax.random.key(0))
        hidden = jax.jit(lambda p, t: model.bind(p).hidden(t, None, END))
        got = np.asarray(hidden(params, placed(tokens)))
        plain = jax.jit(lambda p, t: model.bind(p).hidden(t))
        for row in range(4):
            borders = sorted({0, *np.flatnonzero(tokens[row] == END).tolist(), 24})
            for start, stop in itertools.pairwise(borders):
                alone = np.full((4, 24), 7, np.int32)
                alone[:, : stop - start] = tokens[row, start:stop]
                expected = np.asarray(plain(params, placed(alone)))[0, : stop - start]
                np.testing.assert_allclose(got[row, start:stop], expected, atol=2e-5)


@CASES
def test_the_proof_holds(on_mesh, mesh: tuple[int, int, int], config):
    model = Model(config=config, execution=Execution(unroll=0, remat="full") if config is GPTJ else Execution())
    with on_mesh(*mesh):
        params = jax.jit(model.init)(jax.random.key(0))
        proved = prove_isolation(model, params, placed(rows(8, 24)), END)
    assert proved.rows == 8
    assert 5 <= proved.shared_rows <= 7
    ends = rows(8, 24) == END
    assert proved.documents == sum(1 + row[1:].sum() for row in ends)  # one at position 0 opens the first


def test_the_proof_finds_a_kernel_that_ignores_documents(on_mesh, monkeypatch: pytest.MonkeyPatch):
    whole = layers.attend

    def ignores(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *rest) -> jax.Array:
        causal = jnp.tril(jnp.ones(mask.shape[1:], bool))[None]
        return whole(q, k, v, causal, *rest)

    monkeypatch.setattr(layers, "attend", ignores)
    model = Model(config=GPT2)
    with on_mesh(*SINGLE):
        params = jax.jit(model.init)(jax.random.key(0))
        with pytest.raises(UserError, match=r"attention does not stay within documents: the gradient .* in others"):
            prove_isolation(model, params, placed(rows(8, 24)), END)


@pytest.mark.parametrize(("row", "later", "earlier"), [(3, 2, 1), (3, 3, 1), (0, 1, 0), (2, 4, 2), (1, 3, 2)])
def test_the_proof_finds_a_single_document_that_sees_a_single_other_one(
    on_mesh, monkeypatch: pytest.MonkeyPatch, row: int, later: int, earlier: int
):
    """Whichever row, and wherever in it the two lie: not only the document at some position is asked."""
    tokens = np.random.default_rng(1).integers(6, 50, (4, 24)).astype(np.int32)
    tokens[:, [4, 9, 14, 19]] = END  # documents 0 to 4
    whole, places = layers.attend, (0, 4, 9, 14, 19)

    def leaks(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *rest) -> jax.Array:
        hole = jnp.zeros(mask.shape, bool).at[row, places[later] + 1, places[earlier] + 1].set(True)
        return whole(q, k, v, mask | hole, *rest)

    monkeypatch.setattr(layers, "attend", leaks)
    model = Model(config=GPT2)
    with on_mesh(*SINGLE):
        params = jax.jit(model.init)(jax.random.key(0))
        with pytest.raises(UserError, match=r"attention does not stay within documents"):
            prove_isolation(model, params, placed(tokens), END)


def test_all_microbatches_of_the_first_batch_are_looked_at(monkeypatch: pytest.MonkeyPatch, capsys):
    tokens, seen = rows(6, 9), []

    def looked_at(params: object, part: np.ndarray) -> Isolation:
        assert params == "params"
        seen.append(np.asarray(part))
        return Isolation(rows=len(part), shared_rows=1, documents=4)

    monkeypatch.setattr(loop_module, "isolation_prover", lambda model, end: looked_at if end == END else None)
    loop = SimpleNamespace(
        run=SimpleNamespace(accumulate=3, trainable=SimpleNamespace(joined=lambda params, frozen, key: params)),
        data=SimpleNamespace(document_end=lambda run: END,
                             batches=SimpleNamespace(rows=lambda step, rows: (tokens, None))),
        program=SimpleNamespace(model="model"), frozen={},
    )  # fmt: skip
    feed = SimpleNamespace(rows=range(6), place=lambda whole: whole.reshape(3, 2, 9))
    loop_module._prove_isolation(loop, feed, SimpleNamespace(step=0, params="params"))  # type: ignore[arg-type]
    assert np.array_equal(np.concatenate(seen), tokens[:, :-1])
    said = capsys.readouterr().out
    assert "no token of the first batch sees another document, by gradient (3 of 6 rows hold several" in said
    assert "12 in all" in said


def test_a_kernel_that_cannot_is_refused(on_mesh):
    with pytest.raises(UserError, match=r"execution.attention='cudnn' would look across .* use 'auto', 'splash'"):
        Run(model=GPT2, data=Data(store="a", mask_documents=True), steps=1, global_batch=1,
            execution=Execution(attention="cudnn"))  # fmt: skip
    model = Model(config=GPT2, execution=Execution(attention="cudnn"))
    with on_mesh(*SINGLE):
        params = jax.jit(dataclasses.replace(model, execution=Execution()).init)(jax.random.key(0))
        decoder = functools.partial(model.bind(params).hidden, key=None, document_end=END)
        with pytest.raises(UserError, match="would look across"):
            decoder(placed(rows(2, 8)))
