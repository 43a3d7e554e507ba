"""meshgpt's step, as a contestant (see protocol.py)."""

import sys
import time
from pathlib import Path

import protocol


def main(folder: Path) -> None:
    begun = time.perf_counter()
    import jax
    import numpy as np

    from meshgpt import convert, runtime
    from meshgpt.config import Data, Run
    from meshgpt.distributed.mesh import MeshShape, make_mesh, spec
    from meshgpt.models.layers import Execution
    from meshgpt.models.precision import Precision
    from meshgpt.optim.config import AdamW, Constant
    from meshgpt.training.program import Program
    from meshgpt.training.step import from_params

    runtime.take_turns()
    runtime.keep_freed_memory()
    told = protocol.spec(folder)
    adamw = {name: told[name] for name in ("b1", "b2", "eps", "weight_decay", "clip_norm")}
    run = Run(
        model=convert.read_config(folder),
        data=Data(),
        steps=1 << 30,
        global_batch=told["rows"],
        seq_len=told["length"],
        optim=AdamW(peak_lr=told["learning_rate"], warmup_steps=0, schedule=Constant(), **adamw),
        precision=Precision(compute=told["dtype"]),
        execution=Execution(unroll=told["unroll"], remat=told["remat"]),
    )
    with jax.set_mesh(make_mesh(MeshShape(data=1), jax.devices()[:1])):
        program = Program(run=run)
        params = convert.load(folder, run.model, program.model.abstract_params())
        state = jax.jit(lambda params: from_params(params, run.optim, run.precision))(params)
        del params
        rows = np.load(folder / "tokens.npy", allow_pickle=False).astype(np.int32)
        tokens = jax.device_put(rows[None], spec("_ batch seq"))
        weights = jax.device_put(np.ones((1, told["rows"], told["length"]), np.float32), spec("_ batch seq"))
        train_step = jax.jit(program.train_step(), donate_argnums=0).lower(state, {}, tokens, weights).compile()

        def step() -> float:
            nonlocal state
            state, metrics = train_step(state, {}, tokens, weights)
            return float(jax.block_until_ready(metrics["loss"]))

        stats = jax.devices()[0].memory_stats()
        peak = None if stats is None else lambda: jax.devices()[0].memory_stats()["peak_bytes_in_use"]
        protocol.serve(step, begun, protocol.versions_of("jax", "jaxlib", "flax"), peak)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
