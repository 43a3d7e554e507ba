"""Our models beside transformers' PyTorch ones, on the same weights and tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny
import torch

from meshgpt.distributed.mesh import spec
from meshgpt.models.model import ModelConfig
from meshgpt.objectives.loss import NextToken, next_token_loss
from meshgpt.trees import Tree


def assert_equals_transformers(config: ModelConfig) -> None:
    """Logits within 1e-4, loss within 1e-5, and the gradient of every tensor within 1e-3 of its largest entry."""
    rows = tiny.tokens(3, config.n_positions)
    logits, loss, gradients = _ours(config, rows)
    peer = tiny.torch_peer(config)
    tokens = torch.from_numpy(rows).long()
    theirs = peer(tokens, labels=tokens)
    np.testing.assert_allclose(logits, theirs.logits.detach().numpy(), rtol=0, atol=1e-4)
    assert abs(loss - theirs.loss.item()) < 1e-5
    theirs.loss.backward()
    expected = {name: parameter.grad.numpy() for name, parameter in peer.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        tiny.assert_close(gradient, expected[name], 1e-3, name)


def _ours(config: ModelConfig, rows: np.ndarray) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """Logits without padding, mean loss, and its gradients by Hugging Face's names."""
    model = tiny.model(config)
    loss = next_token_loss(model, NextToken())

    @jax.jit
    def run(params: Tree, tokens: jax.Array) -> tuple[jax.Array, jax.Array, Tree]:
        decoder = model.bind(params)
        weights = jnp.ones((tokens.shape[0], tokens.shape[1] - 1), jnp.float32, out_sharding=spec("batch seq"))
        logits = decoder.logits(decoder.hidden(tokens))
        (total, weight), gradients = jax.value_and_grad(loss, has_aux=True)(params, tokens, weights, None)
        return logits, total / weight, jax.tree.map(lambda g: g / weight, gradients)

    with jax.set_mesh(tiny.mesh()):
        logits, mean, gradients = run(tiny.params(config), jax.device_put(rows, spec("batch _")))
    assert np.isneginf(np.asarray(logits)[..., config.vocab_size :]).all()
    named = tiny.to_numpy(gradients)
    for path, value in named.items():
        if path.endswith(("_VD", "_V")):
            assert (value[config.vocab_size :] == 0).all(), f"{path}: the padding has a gradient"
    return np.asarray(logits)[..., : config.vocab_size], float(mean), tiny.stored(config, named)
