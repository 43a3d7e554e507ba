"""What a run leaves behind when it has finished: samples, a Hugging Face folder, the loss curve, and a summary."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import jax
import numpy as np

from meshgpt import convert
from meshgpt.atomic import write_atomically
from meshgpt.config import Run
from meshgpt.data.store import Store
from meshgpt.data.tokenizer import Tokenizer
from meshgpt.distributed.mesh import batch_shards, spec
from meshgpt.errors import UserError
from meshgpt.evals.intervals import held_out_text
from meshgpt.inference.generate import Sampling, generate_text
from meshgpt.models.model import Model
from meshgpt.models.trainable import plain
from meshgpt.optim.schedules import Piecewise
from meshgpt.training.load import Trained
from meshgpt.training.loss_curve import plot_loss
from meshgpt.training.program import learning_rate_of
from meshgpt.training.run_folder import RunFolder
from meshgpt.training.trackers import read_json_lines
from meshgpt.trees import Tree

PROBE_TOKENS = 128
# The gate compares logits on these words in the model's own tokens: any text serves, as both sides read the same.
_PROBE_TEXT = "The quick brown fox jumps over the lazy dog.\ndef export(run, out):\n    return proof\n" * 8
T = TypeVar("T")


def sampling(run: Run) -> Sampling:
    """How the run's samples are drawn."""
    wanted = run.samples
    return Sampling(
        max_new_tokens=wanted.max_new_tokens, temperature=wanted.temperature, top_p=wanted.top_p, seed=run.seed
    )


def check_samples(run: Run, tokenizer: Tokenizer) -> None:
    """Raises UserError now for what `write_samples` would refuse when the training is done."""
    sampling(run)
    for prompt, tokens in zip(run.samples.prompts, tokenizer.encode_batch(list(run.samples.prompts)), strict=True):
        if len(tokens) >= run.model.n_positions:
            raise UserError(
                f"the prompt {prompt[:40]!r}... of --samples.prompts has {len(tokens)} tokens, and the model's context "
                f"is {run.model.n_positions}: give one of at most {run.model.n_positions - 1}"
            )


def write_samples(run: Run, folder: RunFolder, model: Model, params: Tree, tokenizer: Tokenizer) -> str:
    """Generates the run's samples into `samples.txt`; gives the text."""
    texts = generate_text(model, params, tokenizer, list(run.samples.prompts), sampling(run))
    blocks = [
        f"--- sample {number}, prompt {prompt!r}\n{prompt}{text}\n"
        for number, (prompt, several) in enumerate(zip(run.samples.prompts, texts, strict=True), start=1)
        for text in several
    ]
    if jax.process_index() == 0:
        write_atomically(folder.samples, "\n".join(blocks))
    return "\n".join(blocks)


def probe(model: Model, tokens: np.ndarray) -> convert.Probe:
    """The first of `tokens` and the live forward pass, for the comparison that every export must pass."""
    rows = batch_shards()
    row_T = tokens[: min(PROBE_TOKENS, model.config.n_positions)].astype(np.int32)

    @functools.partial(jax.jit, compiler_options=convert.PROBE_COMPILER_OPTIONS)
    def logits(params: Tree, tokens_BT: jax.Array) -> jax.Array:
        decoder = model.bind(params)
        # On every device, so that each of several processes can read all of them.
        return jax.sharding.reshard(decoder.logits(decoder.hidden(tokens_BT)), spec("_ _ _"))

    def placed(params: Tree, tokens_BT: np.ndarray) -> jax.Array:
        return logits(params, jax.device_put(tokens_BT, spec("batch seq")))

    return convert.Probe(tokens_BT=np.repeat(row_T[None], rows, axis=0), logits=placed)


def export_model(
    trained: Trained,
    out: Path,
    *,
    dtype: Literal["float32", "bfloat16", "float16"],
    family: Literal["own", "phi"] = "own",
    replace: bool = False,
    release: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> convert.Verdict:
    """Writes a Hugging Face folder of a model on the mesh that is set; a quantized one is dequantized.

    Without a tokenizer the logits are compared on random ids.

    Args:
      family: the name that the model goes by, see `convert.export`.
      release: the parameters are given up as they are written.

    Raises:
      UserError: `out` is there already, or what was written is not the model.
    """
    # The comparison is exact: in float32, whatever the model computes in.
    model = dataclasses.replace(
        trained.model, precision=dataclasses.replace(trained.model.precision, compute="float32")
    )
    if trained.its_tokenizer is None:
        tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, PROBE_TOKENS, np.int32)
    else:
        tokens = np.asarray(trained.its_tokenizer.encode(_PROBE_TEXT), np.int32)
    return convert.export(
        plain(trained.params), model.config, trained.its_tokenizer, out, probe=probe(model, tokens), dtype=dtype,
        family=family, replace=replace, release=release, on_progress=on_progress,
    )  # fmt: skip


def export_run(run: Run, folder: RunFolder, model: Model, params: Tree, tokenizer: Tokenizer, store: Store) -> str:
    """Writes `export/`; gives the line that says what was proved. `params` are gone afterwards."""
    assert run.export != "none"
    write = functools.partial(convert.export, params, run.model, tokenizer, folder.export, dtype=run.export)
    split = store.split("val" if store.split("val").num_tokens else "train")
    tokens = split.tokens(0, min(PROBE_TOKENS, split.num_tokens))
    return str(write(probe=probe(model, tokens), replace=True, release=True))


def finish(
    run: Run, folder: RunFolder, model: Model, params: Tree, tokenizer: Tokenizer, store: Store,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Writes the loss curve, the samples and the export, and says the summary; `params` are gone afterwards.

    What only decorates a trained run (curve, samples, summary) is reported where it fails, and the export goes on.

    Args:
        say: takes a line at a time.
    """
    first = jax.process_index() == 0
    if first:
        _optional("the loss curve", lambda: plot_loss(folder.metrics, folder.plot, folder.path.name), say)
    if run.samples.prompts:  # computed by all processes, which fail alike
        text = _optional("the samples", lambda: write_samples(run, folder, model, params, tokenizer), say)
        say(text or "")
    if run.export != "none":
        say(f"export: {export_run(run, folder, model, params, tokenizer, store)}")
    if first:
        say(_optional("the summary", lambda: summary(run, folder), say) or "")


def _optional(what: str, make: Callable[[], T], say: Callable[[str], None]) -> T | None:
    """make(), or None after saying why `what` is missing."""
    try:
        return make()
    except Exception as error:  # whatever it is: hours of training must not be held up by it
        cause = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        say(f"{what} could not be made: {cause}. The model is trained and saved; the same command tries this again")
        return None


def summary(run: Run, folder: RunFolder) -> str:
    """Where everything is, and what to try next."""
    rows = read_json_lines(folder.metrics)
    last = next((row for row in reversed(rows) if row.get("val_loss") is not None), {})
    tokens = folder.batch_sizes().before(run.last_step) * run.sequence_length
    lines = [f"finished: {run.last_step:,} steps, {tokens:,} tokens"]
    if last:
        lines[0] += f", validation loss {last['val_loss']:.4f}{held_out_text(last)}"
    if "val_bits_per_byte" in last:
        lines[0] += f", {last['val_bits_per_byte']:.3f} bits per byte"
        gzip = last.get("gzip_bits_per_byte")
        lines[0] += f" (gzip -9 needs {gzip:.3f})" if gzip else ""
    places = [("checkpoints", folder.checkpoints), ("metrics", folder.metrics), ("loss curve", folder.plot)]
    places += [("samples", folder.samples)] if run.samples.prompts else []
    places += [("Hugging Face model", folder.export)] if run.export != "none" else []
    lines += [f"  {name:<19} {path}" for name, path in places]
    lines += ["what next:", f'  meshgpt generate {folder.path} --prompt "..."']
    lines += [f"  meshgpt report {folder.path}    a model card, plots and a page to look at"]
    lines += [f"  longer: the same command with {how_to_go_on(run)}"]
    lines += ["  afresh: the same command with --resume never sets this run aside and starts again"]
    return "\n".join(lines)


def how_to_go_on(run: Run) -> str:
    """The flags that make a finished run longer, and what becomes of its learning rate."""
    more, longer = run.steps, dataclasses.replace(run, steps=2 * run.last_step, extend=0)
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        last, jump = (float(np.asarray(learning_rate_of(each)(run.last_step))) for each in (run, longer))
    if last <= 0 and isinstance(run.optim.schedule, Piecewise):
        return f"--steps {longer.steps}, once optim.schedule has more pieces: its learning rate has fallen to 0"
    if last <= 0:
        extended = f"--extend {run.extend + more} --extend-schedule rewarmed"
        return f"{extended} goes on from here with a learning rate that rises again; it has fallen to 0"
    if abs(jump / last - 1) < 0.01:
        return f"--steps {longer.steps} goes on from here"
    return (
        f"--extend {run.extend + more} goes on from here at the final learning rate, {last:.2g} "
        f"(--steps {longer.steps} would set it to {jump:.2g})"
    )
