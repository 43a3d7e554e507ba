"""meshgpt from Python: prepare text, train, load a model, and ask it things.

    import meshgpt as mg

    store = mg.prepare("books/", "data/books", train_tokenizer="bpe", vocab_size=8192)
    model = mg.GPT2Config(vocab_size=8192, n_positions=256, n_layers=4, n_heads=4, d_model=128)
    run = mg.train(mg.Run(model=model, data=mg.Data(store="data/books"), steps=200, global_batch=8, run_dir="runs/a"))
    lm = mg.load(run)
    lm.generate("def ", max_new_tokens=40)

One process drives all devices of this machine; several processes are started by the commands (docs/pods.md).
"""

import functools
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from meshgpt import convert, runtime
from meshgpt.config import Run
from meshgpt.data.prepare import Prepare
from meshgpt.data.prepare import prepare as prepare_store
from meshgpt.data.store import Store
from meshgpt.data.tokenizer import Tokenizer
from meshgpt.distributed.batch import fetch
from meshgpt.distributed.mesh import MeshShape, batch_shards, make_mesh, spec
from meshgpt.errors import UserError
from meshgpt.evals import perplexity
from meshgpt.evals.requests import pair_requests
from meshgpt.evals.scoring import Score, Scorer
from meshgpt.inference.generate import Generator
from meshgpt.inference.sampling import Sampling
from meshgpt.models.model import ModelConfig
from meshgpt.models.precision import Precision
from meshgpt.training import finish, loop
from meshgpt.training.callbacks import Callback
from meshgpt.training.load import Trained, open_trained
from meshgpt.training.run_folder import RunFolder
from meshgpt.training.trackers import progress_bar, read_json_lines
from meshgpt.trees import Tree

Paths: TypeAlias = str | PathLike[str]


def prepare(sources: Paths | Sequence[Paths], out: Paths, **settings: Any) -> Store:
    """Makes a token store of text, or opens it where it is made already from the same text and settings.

    Args:
        sources: text files, folders, globs and .jsonl files, plain or compressed; one or several.
        out: the store's folder.
        settings: the other fields of `meshgpt.data.prepare.Prepare`, such as `train_tokenizer="bpe"` with
            `vocab_size=8192`, or `tokenizer="gpt2/"`.

    Raises:
        UserError: sources that cannot be read, or settings that cannot be.
    """
    listed = [sources] if isinstance(sources, str | PathLike) else sources
    with progress_bar() as report:
        return prepare_store(Prepare(sources=tuple(map(str, listed)), out=str(out), **settings), report)


class TrainedRun:
    """What a run has left in its folder. A notebook shows its loss curve.

    Attributes:
        folder: the run's folder.
    """

    def __init__(self, folder: Paths) -> None:
        self.folder = Path(folder)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, one dict a logged step, as `pandas.DataFrame` takes them."""
        return read_json_lines(RunFolder(self.folder).metrics)

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        rows = self.metrics
        last = next((row for row in reversed(rows) if "val_loss" in row), rows[-1] if rows else {})
        kept = {name: round(last[name], 4) for name in ("step", "loss", "val_loss") if name in last}
        return f"TrainedRun({str(self.folder)!r}, {', '.join(f'{name}={value}' for name, value in kept.items())})"

    def _repr_png_(self) -> bytes | None:
        plot = RunFolder(self.folder).plot
        return plot.read_bytes() if plot.is_file() else None


def train(run: Run, callbacks: Sequence[Callback] = ()) -> TrainedRun:
    """Trains on all devices of this process, or goes on with what `run.run_dir` holds; Ctrl-C saves and returns.

    Args:
        callbacks: hear of every step, evaluation and checkpoint.

    Raises:
        UserError: what stands in the way of the run.
    """
    runtime.start()
    loop.train(run, callbacks=callbacks)
    return TrainedRun(run.run_dir)


def load(
    source: Paths,
    *,
    mesh: MeshShape = MeshShape(),
    compute: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    step: int | None = None,
) -> "LanguageModel":
    """Loads a model: a run's folder, an imported or a Hugging Face folder, or a hub id (`gpt2`, `owner/name@revision`).

    Args:
        mesh: how the parameters are spread over this process's devices.
        compute: dtype of activations and matmuls; `auto` is bfloat16 on accelerators and float32 on CPU.
        step: of a run, the checkpoint to take; None takes the newest.

    Raises:
        UserError: nothing there that can be read, or no checkpoint of that step.
    """
    runtime.start()
    devices = make_mesh(mesh)
    with jax.set_mesh(devices):
        trained = open_trained(source, Precision(compute=compute), loop.print_line, step)
    return LanguageModel(trained, devices)


class LanguageModel:
    """A trained model on a mesh of its own, ready to write and to score text.

    Attributes:
        tokenizer: turns text into ids and back.
        mesh: the devices that the parameters are spread over.
    """

    def __init__(self, trained: Trained, mesh: jax.sharding.Mesh) -> None:
        self._trained = trained
        self.tokenizer: Tokenizer = trained.tokenizer
        self.mesh = mesh

    def __repr__(self) -> str:
        return f"LanguageModel({self.config})"

    @property
    def config(self) -> ModelConfig:
        """The model's family and sizes."""
        return self._trained.model.config

    @property
    def params(self) -> Tree:
        """The parameters, a nested dict of arrays (docs/architecture.md names the leaves and their axes)."""
        return self._trained.params

    def generate(
        self, prompts: str | Sequence[str], max_new_tokens: int = 64, *, parse_special: bool = False, **sampling: Any
    ) -> list[str]:
        """Continues texts.

        Args:
            prompts: one text or several; an empty one starts a new text.
            max_new_tokens: largest number of tokens that are drawn for each.
            parse_special: special tokens written in the prompts, such as `<|im_start|>`, become their ids.
            sampling: the other fields of `meshgpt.inference.sampling.Sampling`: `temperature` (0 is greedy), `top_k`,
                `top_p`, `seed`, `samples`.

        Returns:
            The continuations, without their prompts, in the prompts' order; with `samples` of n, the n of the first
            prompt come first.

        Raises:
            UserError: a prompt that leaves no room in the context, or settings that cannot be.
        """
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        wanted = Sampling(max_new_tokens=max_new_tokens, **sampling)
        with jax.set_mesh(self.mesh):
            found = self._generator.generate(
                self.tokenizer.encode_batch(asked, parse_special=parse_special), wanted,
                stop_ids=self.tokenizer.stop_ids, begin_id=self.tokenizer.prefix_id,
                decodable=self.tokenizer.decodable,
            )  # fmt: skip
        return [self.tokenizer.decode(sample) for samples in found for sample in samples]

    def logits(self, tokens: np.ndarray | Sequence[Sequence[int]]) -> np.ndarray:
        """Logits of the token after each given one, float32 (B, T, vocabulary), of token ids (B, T).

        Raises:
            UserError: ids that the model does not know, or more tokens than its context holds.
        """
        given = np.asarray(tokens)
        if given.ndim != 2 or not np.issubdtype(given.dtype, np.integer) or not given.size:
            raise UserError(f"tokens of shape {given.shape} and dtype {given.dtype}: give integers of shape (B, T)")
        if given.shape[1] > self.config.n_positions:
            raise UserError(f"{given.shape[1]} tokens are more than the model's {self.config.n_positions} positions")
        if given.min() < 0 or given.max() >= self.config.vocab_size:
            raise UserError(f"tokens hold ids outside of 0 to {self.config.vocab_size - 1}")
        with jax.set_mesh(self.mesh):
            rows = -(-len(given) // batch_shards()) * batch_shards()
            padded = np.zeros((rows, given.shape[1]), np.int32)
            padded[: len(given)] = given
            found = self._logits(self.params, jax.device_put(padded, spec("batch seq")))
            return fetch(found)[: len(given), :, : self.config.vocab_size]

    def log_likelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """ln p of each continuation after its context, as the lm-evaluation-harness's `loglikelihood` has it.

        Args:
            pairs: (context, continuation); an empty context is the start of a text.

        Returns:
            For each, `log_likelihood` in nats, and `greedy`: whether each of its tokens is the likeliest.
        """
        with jax.set_mesh(self.mesh):
            requests = pair_requests(self.tokenizer, list(pairs))
            return self._scorer.score(requests, _silent, decodable=self.tokenizer.decodable)

    def perplexity(self, texts: str | Sequence[str], stride: int = 0) -> perplexity.Perplexity:
        """Perplexity of texts by token, word and byte, and bits per byte.

        Args:
            texts: one document or several.
            stride: number of tokens by which a window moves on in a long document; 0 is the whole context.
        """
        documents = [texts] if isinstance(texts, str) else list(texts)
        with jax.set_mesh(self.mesh):
            return perplexity.measure(self._scorer, self.tokenizer, documents, _silent, stride=stride)

    def export(
        self, out: Paths, dtype: Literal["float32", "bfloat16", "float16"] = "float32", *, overwrite: bool = False
    ) -> convert.Verdict:
        """Writes a Hugging Face folder, reopened from disk and compared with this model before it gets its name.

        Raises:
            UserError: `out` is there already and `overwrite` is not set, or what was written is not this model.
        """
        with jax.set_mesh(self.mesh):
            return finish.export_model(self._trained, Path(out), dtype=dtype, replace=overwrite)

    @functools.cached_property
    def _generator(self) -> Generator:
        return Generator(self._trained.model, self.params)

    @functools.cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self._trained.model, self.params, self.mesh)

    @functools.cached_property
    def _logits(self) -> Any:
        model = self._scorer.model  # with the default execution, which every machine can do

        @jax.jit
        def logits(params: Tree, tokens_BT: jax.Array) -> jax.Array:
            decoder = model.bind(params)
            return decoder.logits(decoder.hidden(tokens_BT)).astype(jnp.float32)

        return logits


def _silent(label: str, done: int, total: int | None) -> None:
    del label, done, total
