"""The step of transformers 4's Flax GPT-2 and GPT-J, as a contestant (see protocol.py); needs their own environment."""

import sys
import time
from pathlib import Path

import protocol


def main(folder: Path) -> None:
    begun = time.perf_counter()
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import transformers

    told = protocol.spec(folder)
    if (jax.default_backend() == "cpu") != (told["platform"] == "cpu"):
        raise RuntimeError(f"this JAX runs on {jax.default_backend()}, and ours on {told['platform']}")
    dtype = jnp.dtype(told["dtype"])
    names = {"gpt2": "FlaxGPT2LMHeadModel", "gptj": "FlaxGPTJForCausalLM"}  # which transformers 5 does not have
    kind = getattr(transformers, names[told["family"]])
    model = kind.from_pretrained(folder, from_pt=True, dtype=dtype)
    params = model.params
    adamw = optax.adamw(
        told["learning_rate"], b1=told["b1"], b2=told["b2"], eps=told["eps"], weight_decay=told["weight_decay"],
        mask=jax.tree.map(lambda p: p.ndim > 1, params),
    )  # fmt: skip
    optimizer = optax.chain(optax.clip_by_global_norm(told["clip_norm"]), adamw)
    state = optimizer.init(params)
    tokens = jnp.asarray(np.load(folder / "tokens.npy", allow_pickle=False).astype(np.int32))

    def loss_of(params, tokens):
        logits = model(tokens[:, :-1], params=params, train=False).logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def train(params, state, tokens):
        loss, gradients = jax.value_and_grad(loss_of)(params, tokens)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    train = jax.jit(train, donate_argnums=(0, 1))

    def step() -> float:
        nonlocal params, state
        params, state, loss = train(params, state, tokens)
        return float(jax.block_until_ready(loss))

    stats = jax.devices()[0].memory_stats()
    peak = None if stats is None else lambda: jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    protocol.serve(step, begun, protocol.versions_of("transformers", "jax", "jaxlib", "flax", "optax"), peak)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
