"""Documents side by side in a row: as if each stood alone, by value and by gradient, on every mesh."""

import dataclasses
import functools
import itertools

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
from meshgpt.objectives.document_mask import prove_isolation

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
