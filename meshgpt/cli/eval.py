"""The verb `meshgpt eval`."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from meshgpt import flags, runtime
from meshgpt.config import differences
from meshgpt.distributed import processes
from meshgpt.distributed.mesh import MeshShape, make_mesh
from meshgpt.errors import UserError, exit_code
from meshgpt.evals import choices, files, harness, perplexity, results
from meshgpt.evals.results import Results
from meshgpt.evals.scoring import Progress, Scorer
from meshgpt.models.precision import Precision
from meshgpt.settings import settings
from meshgpt.training.load import Trained, open_trained
from meshgpt.training.run_folder import RunFolder
from meshgpt.training.trackers import progress_bar


@settings()
class Arguments:
    """What a trained model is worth: tasks of the lm-evaluation-harness, multiple-choice files, perplexity of texts.

    For example: meshgpt eval runs/a --tasks hellaswag,piqa,lambada_openai
                 meshgpt eval runs/a --perplexity held_out.jsonl --stride 256
                 meshgpt eval runs/a/export --choices hellaswag_val.jsonl --limit 500 --out figures.json

    Of a run, the results go to evals/<step>.json in its folder, where `meshgpt report` finds them. docs/evaluation.md
    says what each figure is, and how tasks run without a network.
    """

    source: Annotated[Path, tyro.conf.Positional]
    """A run's folder, an imported one, or a Hugging Face folder."""
    tasks: str = ""
    """Tasks, groups or tags of the lm-evaluation-harness, separated by commas; `*` and `?` make patterns, such as
    mmlu_*."""
    tasks_path: Path | None = None
    """Folder with tasks of your own (.yaml files, which may run Python), which go before the harness's of their
    names."""
    choices: tuple[Path, ...] = ()
    """Multiple-choice files in HellaSwag's form (JSON lines with ctx, endings, label), scored without the harness."""
    perplexity: tuple[Path, ...] = ()
    """Texts whose perplexity is measured: a text file is one document, each line of a .jsonl file is one."""
    field: str = "text"
    """JSON field that holds the text of a line of --perplexity."""
    stride: int = 0
    """Number of tokens by which a window of --perplexity moves on in a long document; 0 is the whole context."""
    limit: int | None = None
    """Number of questions or documents taken from each task or file, the first ones, for a try, which is marked as one
    everywhere; None takes all."""
    num_fewshot: int | None = None
    """Number of solved examples before each question; None takes what the task says."""
    max_new_tokens: int = dataclasses.field(default=0, metadata={flags.OTHER_NAMES: ("max_gen_toks", "max_tokens")})
    """Largest number of tokens in a generated answer; 0 takes what the task says."""
    batch_size: int = 0
    """Number of sequences in a batch, over all devices; 0 chooses by their length."""
    step: int | None = None
    """Step of the checkpoint to take, of a run; None takes the newest."""
    out: Path | None = None
    """File that the results are written to, beside what is there already; None takes evals/<step>.json of a run."""
    compute: Literal["auto", "float32", "bfloat16", "float16"] = dataclasses.field(
        default="auto", metadata={flags.OTHER_NAMES: ("precision.compute",)}
    )
    """Dtype of activations and matmuls; `auto` is bfloat16 on accelerators and float32 on CPU."""
    mesh: MeshShape = MeshShape()
    """How devices are arranged."""

    def __post_init__(self) -> None:
        if not (self.task_names or self.choices or self.perplexity):
            raise UserError("nothing to evaluate: give --tasks NAMES, --choices FILE or --perplexity FILE")
        for name in ("limit", "num_fewshot"):
            value = getattr(self, name)
            if value is not None and value < (name == "limit"):
                raise UserError(f"--{name.replace('_', '-')} {value}: give at least {int(name == 'limit')}")
        if self.max_new_tokens < 0 or self.stride < 0:
            raise UserError(f"--max-new-tokens {self.max_new_tokens}, --stride {self.stride}: these cannot be negative")
        if self.stride and not self.perplexity:
            raise UserError(f"--stride {self.stride} is of --perplexity, which is not given")

    @property
    def task_names(self) -> list[str]:
        return [name.strip() for name in self.tasks.split(",") if name.strip()]


def main(arguments: Sequence[str]) -> int:
    """meshgpt eval RUN|FOLDER --tasks NAMES | --choices FILE | --perplexity FILE; gives the exit code."""

    def command() -> None:
        place, rest = processes.take_flags(arguments)
        asked = flags.parse(Arguments, rest, "meshgpt eval", more=processes.HELP)
        runtime.start()
        with processes.distributed_session(processes.process_spec(place), print):
            processes.check_agreement(json.loads(json.dumps(dataclasses.asdict(asked), default=str)), differences)
            evaluate(asked)

    return processes.leave(exit_code(command))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What was asked for, read and checked before the model is opened."""

    tasks: dict[str, Any] | None  # of `harness.load`
    choices: dict[str, list[choices.Question]]  # by the name in the results
    perplexity: dict[str, list[str]]
    whole: dict[str, int]  # questions or documents of each file, before a limit


def evaluate(asked: Arguments) -> Results:
    """Measures what was asked for, prints it, keeps it, and gives it. All processes of a run call it."""
    first = jax.process_index() == 0
    wanted = processes.primary_first(lambda: _wanted(asked), lambda: _wanted(asked))
    mesh = make_mesh(asked.mesh)
    with jax.set_mesh(mesh), _progress(first) as report:
        trained = open_trained(asked.source, Precision(compute=asked.compute), print if first else _silent, asked.step)
        path = asked.out or (None if asked.limit else _kept(asked.source, trained.step))  # a try is not a result
        if path is not None:  # now, and not when all is measured
            processes.primary_first(lambda: results.read(path), lambda: None)
        scorer = Scorer(trained.model, trained.params, mesh, asked.batch_size)
        found = _measured(asked, wanted, trained, scorer, report)
    if first:
        print(results.table(found))
        if scorer.truncated:
            print(
                f"{scorer.truncated:,} texts did not fit the context of {scorer.context:,} tokens and lost their start"
            )
        if path is None:
            print("to keep these figures, give --out FILE")
        else:
            results.save(path, found)
            print(f"{path} holds them")
    return found


def _wanted(asked: Arguments) -> _Wanted:
    tasks = None
    if asked.task_names:
        if jax.process_index() == 0:
            print("loading tasks (a fetch that fails is tried again for half a minute)", flush=True)
        known = harness.open_tasks(asked.tasks_path)
        names = harness.resolve(known, asked.task_names)
        tasks = harness.load(known, names, asked.num_fewshot)
    called = [files.stem(path) for path in (*asked.choices, *asked.perplexity)]
    twice = next((name for name in called if called.count(name) > 1 or (tasks and name in tasks["tasks"])), None)
    if twice is not None:
        raise UserError(f"two files are called {twice}, or one and a task, and results are kept by name: rename one")
    questions = {files.stem(path): choices.read_questions(files.read_json_lines(path)) for path in asked.choices}
    texts = {files.stem(path): files.read_texts(path, asked.field) for path in asked.perplexity}
    return _Wanted(
        tasks=tasks,
        choices={name: rows[: asked.limit] for name, rows in questions.items()},
        perplexity={name: documents[: asked.limit] for name, documents in texts.items()},
        whole={name: len(rows) for name, rows in (*questions.items(), *texts.items())},
    )


def _measured(asked: Arguments, wanted: _Wanted, trained: Trained, scorer: Scorer, report: Progress) -> Results:
    found: Results = {"results": {}}
    for name, texts in wanted.perplexity.items():
        measured = perplexity.measure(scorer, trained.tokenizer, texts, report, stride=asked.stride)
        if measured.lost and jax.process_index() == 0:
            print(
                f"{name}: the tokenizer loses {measured.lost:,} characters, which nothing predicts: perplexity by word "
                "and byte and bits per byte look better than they are"
            )
        found = results.merged(found, results.of_perplexity(name, measured, wanted.whole[name]))
    for name, questions in wanted.choices.items():
        answered = choices.choose(scorer, trained.tokenizer, questions, report)
        found = results.merged(found, results.of_choices(name, answered, wanted.whole[name]))
    if wanted.tasks is not None:
        ran = harness.run(
            scorer, trained.tokenizer, wanted.tasks, report, limit=asked.limit, max_gen_toks=asked.max_new_tokens
        )
        found = results.merged(found, ran)
    return found | {"model_name": str(asked.source)}


def _kept(source: Path, step: int | None) -> Path | None:
    """Where the results of a run's step lie."""
    return None if step is None else RunFolder(source).evals / f"{step}.json"


@contextmanager
def _progress(shown: bool) -> Iterator[Progress]:
    if shown:
        with progress_bar() as report:
            yield report
    else:
        yield lambda label, done, total: None


def _silent(text: str) -> None:
    del text
