"""What a run measures on its way: its held-out text, named stores, multiple-choice files, tasks of the harness.

Figures are keys of metrics.jsonl: `val_loss` and `val_bits_per_byte` of the run's own text, `val/<store>/loss`,
`val/<store>/perplexity` and `val/<store>/bits_per_byte`, `eval/<task or file>/<metric>`. Tasks and files are also kept
in the harness's form, in `evals/<step>.json`. What is cut (`eval_batches`, `evals.limit`) is marked: `val_tokens` of
`val_tokens_of`, `val_loss_low` and `val_loss_high`, the same after `val/<store>/`, and what `evals.results.metrics`
adds.
"""

import contextlib
import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from meshgpt.config import Evals, Run
from meshgpt.data.pipeline import EvalBatches
from meshgpt.data.store import Store
from meshgpt.data.tokenizer import Tokenizer
from meshgpt.distributed import processes, stopping
from meshgpt.distributed.batch import Feed
from meshgpt.errors import UserError
from meshgpt.evals import choices, files, harness, results
from meshgpt.evals.choices import Question
from meshgpt.evals.intervals import Interval, Part, ratio_interval
from meshgpt.evals.results import Results
from meshgpt.evals.scoring import Scorer, check_fits
from meshgpt.models.model import Model
from meshgpt.training.data import RunData, check_tokenizers, check_vocabulary
from meshgpt.training.program import EvalStep, Program
from meshgpt.training.run_folder import RunFolder
from meshgpt.trees import Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Of a held-out text. loss: nats a token. interval: of the loss, with 95%, by resampling batches, where only a
    part was measured and it has several. part: tokens."""

    loss: float
    bits_per_byte: float | None  # None where the tokenizer loses a part of the text
    interval: Interval | None
    part: Part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validation:
    """What is measured, opened once. stores: by name. choices: all questions by the file's name, of which the run's
    limit are put. tasks: as `harness.load` gives them, None where there are none."""

    program: Program
    mesh: Mesh
    folder: RunFolder
    eval_step: EvalStep
    tokenizer: Tokenizer
    held_out: EvalBatches | None
    stores: dict[str, EvalBatches]
    choices: dict[str, list[Question]]
    tasks: dict[str, Any] | None

    @property
    def run(self) -> Run:
        return self.program.run

    def due(self, step: int) -> bool:
        """Whether something is measured after `step`."""
        own = self.held_out is not None and self._is_time(step, self.run.eval_every)
        return own or (self._has_others and self._is_time(step, self.run.evals.every or self.run.eval_every))

    def figures(self, step: int, params: Tree, frozen: Tree) -> dict[str, float]:
        """What is due after `step`, of what a run trains and what it only reads. Every process calls it.

        Raises:
          Stopped: a signal asked the run to stop, and it has steps that are not saved.
        """
        found: dict[str, float] = {}
        if self.held_out is not None and self._is_time(step, self.run.eval_every):
            found |= self._own(params, frozen)
        if self._has_others and self._is_time(step, self.run.evals.every or self.run.eval_every):
            for name, batches in self.stores.items():
                measured = self._measured(batches, params, frozen)
                figures = {"loss": measured.loss, "perplexity": _exp(measured.loss)}
                if measured.bits_per_byte is not None:
                    figures["bits_per_byte"] = measured.bits_per_byte
                found |= {f"val/{name}/{figure}": value for figure, value in figures.items()}
                found |= self._marks(measured, f"val/{name}/")
            if self.choices or self.tasks:
                found |= self._answered(step, self.run.trainable.merged(params, frozen))
        return found

    def _is_time(self, step: int, every: int) -> bool:
        return step == self.run.last_step or step % every == 0

    @property
    def _has_others(self) -> bool:
        return bool(self.stores or self.choices or self.tasks)

    def held_out_loss(self, params: Tree, frozen: Tree) -> float:
        """Nats a token of the run's own held-out text, which it must have."""
        assert self.held_out is not None
        return self._measured(self.held_out, params, frozen).loss

    def _own(self, params: Tree, frozen: Tree) -> dict[str, float]:
        """Of the run's own held-out text."""
        assert self.held_out is not None
        measured = self._measured(self.held_out, params, frozen)
        figures = {"val_loss": measured.loss}
        if measured.bits_per_byte is not None:
            figures["val_bits_per_byte"] = measured.bits_per_byte
        figures |= self._marks(measured, "val_")
        if self.held_out.gzip_bits_per_byte is not None:
            figures["gzip_bits_per_byte"] = self.held_out.gzip_bits_per_byte
        return figures

    def _marks(self, measured: "Measured", prefix: str) -> dict[str, float]:
        """What says in the metrics how much was measured, of a run that measures a part (`eval_batches`)."""
        if not self.run.eval_batches:
            return {}
        part, between = measured.part, measured.interval
        marks = {f"{prefix}tokens": float(part.used), f"{prefix}tokens_of": float(part.of or 0)}
        return marks | ({} if between is None else {f"{prefix}loss_low": between[0], f"{prefix}loss_high": between[1]})

    def _measured(self, batches: EvalBatches, params: Tree, frozen: Tree) -> "Measured":
        """Over every token of a text, or of its first `eval_batches`."""
        feed = Feed(self.mesh, 1, batches.global_batch)
        count = len(batches)
        if self.run.eval_batches:
            count = min(count, self.run.eval_batches * self.run.accumulate)
        sums = []
        for batch in range(count):
            stopping.check()
            tokens, weights = (feed.place(part)[0] for part in batches.rows(batch, feed.rows))
            sums.append(self.eval_step(params, frozen, tokens, weights))
        nats_b, tokens_b = np.array([[float(value) for value in pair] for pair in sums]).T
        nats, tokens = math.fsum(nats_b), round(math.fsum(tokens_b))
        return Measured(
            loss=nats / tokens,
            bits_per_byte=nats / math.log(2) / batches.bytes_of(tokens) if batches.lossless else None,
            interval=ratio_interval(nats_b, tokens_b) if tokens < batches.num_tokens else None,
            part=Part(used=tokens, of=batches.num_tokens),
        )

    def _answered(self, step: int, params: Tree) -> dict[str, float]:
        found = self.answers(self.program.model, params)
        if jax.process_index() == 0:
            results.save(self.folder.evals / f"{step}.json", found)
        return results.metrics(found)

    def answers(self, model: Model, params: Tree) -> Results:
        """The figures of the multiple-choice files and the tasks, of the run's model or another one."""
        scorer = Scorer(model, params, self.mesh)
        found: Results = {"results": {}}
        for name, questions in self.choices.items():
            put = questions[: self.run.evals.limit or None]
            accuracy = choices.choose(scorer, self.tokenizer, put, _silent)
            found = results.merged(found, results.of_choices(name, accuracy, len(questions)))
        if self.tasks:
            # The harness's bars of what it prepares would break the run's own line.
            with contextlib.redirect_stderr(io.StringIO()):
                ran = harness.run(
                    scorer, self.tokenizer, self.tasks, _silent,
                    limit=self.run.evals.limit or None, max_gen_toks=self.run.evals.max_gen_toks,
                )  # fmt: skip
            found = results.merged(found, ran)
        return found


def open_validation(program: Program, mesh: Mesh, folder: RunFolder, data: RunData) -> Validation:
    """Opens and checks everything now, so that a run does not fail on it hours later.

    Raises:
      UserError: a store, a file or a task that is not there or not right for this run; says which.
    """
    run, evals = program.run, program.run.evals
    tokenizer = data.tokenizer()
    others = processes.primary_first(lambda: _opened(run, data), lambda: _opened(run, data))
    questions = {files.stem(Path(path)): _questions(Path(path), evals, tokenizer, program) for path in evals.choices}
    if len(questions) < len(evals.choices):
        raise UserError(f"--evals.choices {', '.join(evals.choices)}: two files have one name; rename one")
    tasks = processes.primary_first(lambda: _tasks(evals), lambda: _tasks(evals)) if evals.tasks else None
    both = sorted(questions.keys() & (tasks or {"tasks": {}})["tasks"].keys())
    if both:
        raise UserError(f"--evals.choices: a file and a task are called {both[0]}; rename the file")
    return Validation(
        program=program,
        mesh=mesh,
        folder=folder,
        eval_step=jax.jit(program.eval_step()),
        tokenizer=tokenizer,
        held_out=data.validation,
        stores=others,
        choices=questions,
        tasks=tasks,
    )


def _opened(run: Run, data: RunData) -> dict[str, EvalBatches]:
    """The named stores, each of the run's own tokenizer."""
    folders = dict(zip(map(Evals.store_name, run.evals.stores), run.evals.stores, strict=True))
    stores = {name: Store.open(store.partition("=")[2]) for name, store in folders.items()}
    check_tokenizers([data.first_store, *stores.values()])
    check_vocabulary(stores, run)
    micro = run.global_batch // run.accumulate
    found = {}
    for name, store in stores.items():
        split = store.split("val") if store.split("val").num_tokens else store.split("train")
        found[name] = EvalBatches(splits=(split,), seq_len=run.sequence_length, global_batch=micro)
    return found


def _questions(path: Path, evals: Evals, tokenizer: Tokenizer, program: Program) -> list[Question]:
    questions = choices.read_questions(files.read_json_lines(path))
    check_fits(choices.requests_of(tokenizer, questions[: evals.limit or None]), program.model.config)
    return questions


def _tasks(evals: Evals) -> dict[str, Any]:
    known = harness.open_tasks(Path(evals.tasks_path) if evals.tasks_path else None)
    return harness.load(known, harness.resolve(known, evals.tasks), evals.num_fewshot)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _silent(label: str, done: int, total: int | None) -> None:
    del label, done, total
