"""A model in bfloat16, int8 and nf4 beside each other: bytes on the device, tokens a second generated and read.

    python benchmarks/quantized.py --layers 12 --width 768

Random weights of GPT-2's shape: neither figure depends on what they are. "read" is a forward pass over whole rows, as
an evaluation does it; "generated" is one token after another, batch 1 unless --batch says otherwise. Weights of few
bits are dequantized inside the matmuls' program, again for every token.
"""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import record

from meshgpt import convert, runtime
from meshgpt.convert.hf_names import Stored, stored_tensors
from meshgpt.data.tokenizer import ByteLevelBPE, train_bpe
from meshgpt.distributed.mesh import MeshShape, make_mesh, spec
from meshgpt.inference.generate import Sampling, generate_text
from meshgpt.models.model import GPT2Config, Model
from meshgpt.models.precision import Precision
from meshgpt.trees import Tree


@dataclasses.dataclass(frozen=True)
class Measured:
    """Bytes of the parameters on the device; tokens a second."""

    form: str
    nbytes: int
    read: float
    generated: float


def contents(config: GPT2Config) -> Iterator[tuple[Stored, np.ndarray]]:
    rng = np.random.default_rng(0)
    for tensor in stored_tensors(config):
        yield tensor, (rng.normal(size=tensor.shape) * 0.02).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _read(model: Model, params: Tree, tokens_BT: jax.Array) -> jax.Array:
    return jnp.sum(model.bind(params).hidden(tokens_BT).astype(jnp.float32))


def measure(form: str, model: Model, params: Tree, tokenizer: ByteLevelBPE, batch: int, new: int) -> Measured:
    tokens = jax.device_put(np.zeros((batch, model.config.n_positions), np.int32), spec("batch seq"))
    _read(model, params, tokens).block_until_ready()
    begun = time.perf_counter()
    for _ in range(3):
        _read(model, params, tokens).block_until_ready()
    read = 3 * tokens.size / (time.perf_counter() - begun)
    sampling = Sampling(max_new_tokens=new, temperature=1.0)
    generate = functools.partial(generate_text, model, params, tokenizer, ["a"] * batch, sampling)
    generate()
    begun = time.perf_counter()
    generate()
    generated = batch * new / (time.perf_counter() - begun)
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return Measured(form, nbytes, read, generated)


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new", type=int, default=64)
    asked = parser.parse_args()
    begun = record.begin("quantized", asked)
    runtime.start()
    tokenizer = train_bpe(["a text of a few words, which is all that is needed here"], 257)
    config = GPT2Config(
        vocab_size=asked.vocab, n_positions=asked.positions, n_layers=asked.layers, n_heads=asked.width // 64,
        d_model=asked.width,
    )  # fmt: skip
    model = Model(config=config, precision=Precision(params="bfloat16", compute="bfloat16"))
    with jax.set_mesh(make_mesh(MeshShape())), tempfile.TemporaryDirectory() as scratch:
        params = model.init(jax.random.key(0))
        rows = [measure("bfloat16", model, params, tokenizer, asked.batch, asked.new)]
        del params
        forms = [convert.BnbForm(kind="int8"), convert.BnbForm(kind="nf4")]
        for form in forms:
            folder = Path(scratch) / form.kind
            convert.quantize(
                contents(config), config, tokenizer, form, folder, lambda _: None, lambda done, total: None
            )
            params = convert.load(folder, config, model.abstract_params())
            rows.append(measure(form.kind, model, params, tokenizer, asked.batch, asked.new))
            del params
    print(f"{jax.devices()[0].device_kind}, {asked.layers} layers x {asked.width}, batch {asked.batch}")
    print("| form | bytes | read, tokens/s | generated, tokens/s |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row.form} | {row.nbytes:,} | {row.read:,.0f} | {row.generated:,.1f} |")
    begun.write({"rows": [dataclasses.asdict(row) for row in rows]}, {})


if __name__ == "__main__":
    main()
