"""Tiny training runs for the tests of the loop and the verbs: a corpus, a store, recipes, and ways to run commands.

conftest.py makes fixtures of these: `workshop`, `here`, `finished`, `finished_gpt2`.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from meshgpt import cli, train
from meshgpt.checkpoint.manager import restore_params
from meshgpt.data.prepare import Prepare, prepare
from meshgpt.models.model import Model
from meshgpt.training.run_folder import RunFolder
from meshgpt.trees import leaves_with_names

ROOT = Path(__file__).parent.parent
FILES = ("argparse", "ast", "dataclasses", "enum", "functools", "heapq", "shutil", "textwrap", "typing")
VOCAB = 320
MODELS = {
    "gptj": f"GPTJConfig(vocab_size={VOCAB}, n_positions=32, n_layers=2, n_heads=4, d_model=32, rotary_dim=4)",
    # Dropout, so that a resumed run must draw what an uninterrupted one would have drawn.
    "gpt2": f"GPT2Config(vocab_size={VOCAB}, n_positions=32, n_layers=2, n_heads=4, d_model=32, resid_dropout=0.1)",
}
RECIPE = """from meshgpt.checkpoint.manager import Checkpointing
from meshgpt.config import Data, Run, Samples
from meshgpt.models import GPT2Config, GPTJConfig
from meshgpt.optim import AdamW


def config():
    return Run(
        model={model},
        data=Data(store={store!r}),
        steps=20,
        global_batch=8,
        optim=AdamW(peak_lr=3e-3, warmup_steps=4),
        eval_every=10,
        eval_batches=4,
        log_every=1,
        checkpointing=Checkpointing(every=5),
        samples=Samples(prompts=("def ", "import "), max_new_tokens=8),
    )
"""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    def refused(self, *words: str) -> None:
        """Asserts that it ended on the user's mistake: exit code 2, one message with these words, no traceback."""
        assert self.code == 2, self
        assert "Traceback" not in self.out + self.err, self
        said = " ".join(self.err.replace("│", " ").split())  # a frame around a message may break its lines
        for word in words:
            assert word in said, (word, self)


@dataclasses.dataclass(frozen=True)
class Workshop:
    """Where runs are made, with one compilation cache for all of them."""

    folder: Path
    texts: Path
    store: Path

    def recipe(self, folder: Path, family: str = "gptj", store: Path | None = None) -> Path:
        path = folder / f"tiny_{family}.py"
        path.write_text(RECIPE.format(model=MODELS[family], store=str(store or self.store)))
        return path

    def start(
        self, *arguments: object, devices: int = 1, module: str = "meshgpt.train", **popen: Any
    ) -> subprocess.Popen:
        """A command in a process of its own, its output in pipes."""
        command = [sys.executable, "-m", module, *map(str, arguments)]
        return subprocess.Popen(
            command, env=self.environment(devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen
        )

    def environment(self, devices: int = 1) -> dict[str, str]:
        """Of a process on so many CPU devices that shares the compilation cache."""
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "COLUMNS": "120",
        }

    def run(self, *arguments: object, devices: int = 1, module: str = "meshgpt.train", **popen: Any) -> Ended:
        process = self.start(*arguments, devices=devices, module=module, **popen)
        out, err = process.communicate(timeout=600)
        return Ended(process.returncode, out, err)

    @contextlib.contextmanager
    def cached(self) -> Iterator[None]:
        """This process's compilations go through the cache too, and are quick ones."""
        wanted = {
            "jax_compilation_cache_dir": str(self.folder / "xla"),
            "jax_persistent_cache_min_compile_time_secs": 0.0,
            "jax_disable_most_optimizations": True,
        }
        before = {name: jax.config.values[name] for name in wanted}
        try:
            for name, value in wanted.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()


@dataclasses.dataclass(frozen=True)
class Here:
    """Commands in this process, on its eight devices."""

    workshop: Workshop
    capture: pytest.CaptureFixture[str]

    def train(self, *arguments: object) -> Ended:
        return self._ended(lambda: train.main([*map(str, arguments)]))

    def cli(self, *arguments: object) -> Ended:
        return self._ended(lambda: cli.main([*map(str, arguments)]))

    def _ended(self, command: Callable[[], int]) -> Ended:
        self.capture.readouterr()
        with self.workshop.cached():
            try:
                code = command()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0
        out, err = self.capture.readouterr()
        return Ended(code, out, err)


def make_workshop(folder: Path) -> Workshop:
    texts = folder / "texts"
    texts.mkdir()
    for name in FILES:
        shutil.copyfile(Path(sysconfig.get_path("stdlib")) / f"{name}.py", texts / f"{name}.txt")
    store = folder / "store"
    make_store(store, texts, train_tokenizer="bpe", vocab_size=VOCAB, val_fraction=0.2)
    return Workshop(folder, texts, store)


def make_store(out: Path, source: Path, **settings: Any) -> Path:
    """A token store of a file or a folder."""
    prepare(Prepare(sources=(str(source),), out=str(out), workers=1, **settings), lambda label, done, total: None)
    return out


def make_finished(workshop: Workshop, family: str) -> Path:
    """The folder of a run of 20 steps, done at once on one device; its output beside it."""
    run = workshop.folder / f"finished-{family}"
    ended = workshop.run(workshop.recipe(workshop.folder, family), "--run-dir", run)
    assert ended.code == 0, ended
    run.with_suffix(".out").write_text(ended.out)
    return run


def copied(run: Path, to: Path) -> Path:
    """A copy of a run's folder, to be changed."""
    return Path(shutil.copytree(run, to, symlinks=True))


def rows(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float, float | None]]:
    return [(row["step"], row["loss"], row.get("val_loss")) for row in rows(run)]


def saved_params(run: Path, step: int) -> dict[str, np.ndarray]:
    """The parameters of a checkpoint, by name."""
    from meshgpt.distributed.mesh import MeshShape, make_mesh

    folder = RunFolder(run)
    with jax.set_mesh(make_mesh(MeshShape(), jax.devices()[:1])):
        params = restore_params(folder.checkpoints, step, Model(config=folder.read_run().model).abstract_params())
    return {name: np.asarray(leaf) for name, leaf in leaves_with_names(params)}


def drop_checkpoint(run: Path, step: int) -> None:
    (run / "checkpoints" / f"{step}.digests.json").unlink()
    shutil.rmtree(run / "checkpoints" / str(step))


def assert_same_end(run: Path, other: Path, step: int = 20) -> None:
    """Bit for bit: parameters, export and samples; and the history of losses."""
    ours, theirs = saved_params(run, step), saved_params(other, step)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.tobytes() == theirs[name].tobytes(), name
    for file in ("export/model.safetensors", "samples.txt"):
        assert (run / file).read_bytes() == (other / file).read_bytes(), file
    assert losses(run) == losses(other)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> bool:
    """Waits until `condition`; False if the process ended before."""
    until = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.001)
    return True


def last_step(run: Path) -> int:
    """The newest step in the metrics, as far as they can be read while they are written."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    steps = []
    for line in lines:
        with contextlib.suppress(ValueError):
            steps.append(json.loads(line)["step"])
    return max(steps, default=0)
