"""Tasks of EleutherAI's lm-evaluation-harness: found by name, loaded, run, and refused in words.

Needs the extra `eval`; this module imports it when a function is called.
"""

import difflib
import importlib.metadata
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from meshgpt.data.tokenizer import Tokenizer
from meshgpt.errors import MachineError, UserError, explained
from meshgpt.evals.intervals import Interval, bootstrap, is_share, wilson
from meshgpt.evals.lm import Answers, harness_lm
from meshgpt.evals.results import Results
from meshgpt.evals.scoring import Progress, Scorer

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

# The harness's own defaults, so that shots are the ones its command draws.
_SEED, _SHOTS_SEED = 0, 1234
# Of perplexities and F1: a standard error is good to 2% by these, and the harness's 100,000 take minutes.
_BOOTSTRAP = 1000
# What a task that cannot be loaded raises, by its files or the network.
_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError)


def check_installed() -> None:
    """Raises UserError where the harness is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(f"tasks need the lm-evaluation-harness ({error}): pip install 'meshgpt[eval]'") from error


def open_tasks(folder: Path | None = None) -> "TaskManager":
    """The harness's tasks and those of the YAML files in `folder`, which take the place of others of their names.

    A task's YAML may name Python functions beside it, which run here: use folders that you would run programs from.

    Raises:
      UserError: no such folder, or the harness is not installed.
    """
    check_installed()
    from lm_eval.tasks import TaskManager

    for name in ("lm_eval", "huggingface_hub"):  # the latter says of every try that there is no network
        logging.getLogger(name).setLevel(logging.ERROR)
    if folder is not None and not any(folder.glob("**/*.yaml")):
        raise UserError(f"--tasks-path {folder} holds no .yaml file of a task: see docs/evaluation.md for one")
    return TaskManager(include_path=None if folder is None else str(folder))


def resolve(tasks: "TaskManager", asked: Sequence[str]) -> list[str]:
    """Names of tasks, groups and tags; those with `*` or `?` are patterns.

    Raises:
      UserError: for a name that the harness does not have; says the nearest.
    """
    found: list[str] = []
    for name in asked:
        matches = tasks.match_tasks([name]) if any(letter in name for letter in "*?") else [name]
        unknown = [match for match in matches if match not in tasks.task_index]
        if unknown or not matches:
            near = difflib.get_close_matches(name, tasks.all_tasks, n=3)
            said = f"; the nearest names are {', '.join(near)}" if near else ""
            raise UserError(f"--tasks {name}: there is no such task{said}. `lm-eval ls tasks` lists all")
        found += [match for match in matches if match not in found]
    return found


def load(tasks: "TaskManager", names: Sequence[str], num_fewshot: int | None = None) -> dict[str, Any]:
    """Tasks with their data, as `run` takes them; the data come from the Hugging Face hub or its cache.

    Args:
      num_fewshot: solved examples before each question, for tasks that do not fix it at 0.

    Raises:
      UserError: data that are not there, or a task that is not right; says what is missing.
      MachineError: the same where the network fails.
    """
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        try:
            with _repeatable():  # some tasks shuffle answers as they load
                one = tasks.load([name])
        except _LOAD_ERRORS as error:
            raise _unloaded(error, _missing(tasks, name, error)) from error
        for part in loaded:
            loaded[part] |= one.get(part, {})
    for name, task in loaded["tasks"].items():
        for flag, said in (("UNSAFE_CODE", "runs code that the model wrote"), ("MULTIMODAL", "shows more than text")):
            if getattr(task, flag, False):
                raise UserError(f"--tasks {name}: this task {said}, which meshgpt does not do; leave it out")
        fixed = task.get_config("num_fewshot")
        if num_fewshot is not None and fixed != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif fixed is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def run(
    scorer: Scorer,
    tokenizer: Tokenizer,
    loaded: dict[str, Any],
    report: Progress,
    *,
    limit: int | None = None,
    max_gen_toks: int = 0,
) -> Results:
    """The results of loaded tasks, in the harness's form, with `intervals` (`results`).

    Args:
      limit: take only the first so many questions of each task.
      max_gen_toks: most tokens of a generated answer; 0 is as many as the task says.

    Raises:
      UserError: a question or a way of generating that this model cannot do; says why.
    """
    from lm_eval.evaluator import evaluate

    begun = time.time()
    for task in loaded["tasks"].values():  # each time: the sampler goes on from where it was
        task.set_fewshot_seed(seed=_SHOTS_SEED)
    lm = harness_lm(Answers(scorer, tokenizer, report, max_gen_toks))
    with _repeatable():
        found = evaluate(
            lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=_BOOTSTRAP, log_samples=limit is not None
        )
        assert found is not None
        samples = found.pop("samples", {})
        intervals = _intervals(loaded["tasks"], dict(found), samples)
    return {
        **found,
        "intervals": intervals,
        "config": {
            "model": "meshgpt",
            "batch_size": scorer.batch_size or "auto",
            "limit": limit,
            "bootstrap_iters": _BOOTSTRAP,
            "random_seed": _SEED,
            "numpy_seed": _SHOTS_SEED,
            "fewshot_seed": _SHOTS_SEED,
        },
        "date": begun,
        "lm_eval_version": importlib.metadata.version("lm_eval"),
        "total_evaluation_time_seconds": str(time.time() - begun),
    }


def _intervals(tasks: dict[str, Any], found: Results, samples: dict[str, Any]) -> dict[str, dict[str, Interval | None]]:
    """The 95% interval of each figure of each task, by its answers where they were kept (`samples`).

    Wilson's where an answer is right or wrong, and without the answers of every share; else the percentiles of the
    task's own figure over answers drawn again and again.
    """
    ranges: dict[str, dict[str, Interval | None]] = {}
    for name, task in tasks.items():
        count = found["n-samples"][name]["effective"]
        ranges[name] = {}
        for key, value in found["results"][name].items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float | np.number):
                continue
            answers = [one[metric] for one in samples.get(name, ()) if one["filter"] == chosen and metric in one]
            share = is_share(metric, float(value))
            if share and (not answers or all(answer in (0, 1) for answer in answers)):
                ranges[name][key] = wilson(float(value), count)
            else:
                ranges[name][key] = _resampled(task.aggregation()[metric], answers) if answers else None
    return ranges


def _resampled(figure: Callable[[list[Any]], float], answers: list[Any]) -> Interval | None:
    return bootstrap(len(answers), lambda indices: float(figure([answers[index] for index in indices])))


def leaves(tasks: "TaskManager", name: str) -> list[str]:
    """The names of the tasks that a task, group or tag stands for."""
    entry = tasks.task_index[name]
    if entry.tags and entry.cfg is None:
        return [leaf for member in sorted(entry.tags) for leaf in leaves(tasks, member)]
    members = (entry.cfg or {}).get("task")
    if not isinstance(members, list):
        return [name]
    named = [member if isinstance(member, str) else member.get("task", member.get("group")) for member in members]
    return [leaf for member in named if member in tasks.task_index for leaf in leaves(tasks, member)]


def _unloaded(error: Exception, text: str) -> UserError | MachineError:
    """A network that fails is the machine's fault; one that was switched off (HF_HUB_OFFLINE) is the user's wish."""
    from datasets import config

    if isinstance(error, ConnectionError | TimeoutError) and not config.HF_HUB_OFFLINE:
        return explained(error, text)
    return UserError(text)


def _missing(tasks: "TaskManager", name: str, error: Exception) -> str:
    """Which data a task wants, and where they may lie."""
    from datasets import config as hub

    found = [tasks.task_index[leaf] for leaf in leaves(tasks, name)]
    wanted = {(entry.cfg or {}).get("dataset_path"): entry for entry in found}
    said = str(error).strip().split("\n")[0] or type(error).__name__
    path, entry = next(iter(wanted.items()), (None, tasks.task_index[name]))
    configuration = entry.cfg or {}
    if path is None or path in ("json", "csv", "parquet", "text", "arrow") or Path(str(path)).exists():
        return f"--tasks {name}: the task in {entry.yaml_path} cannot be loaded ({type(error).__name__}: {said})"
    splits = [configuration[f"{split}_split"] for split in ("training", "validation", "test", "fewshot")
              if configuration.get(f"{split}_split")]  # fmt: skip
    parts = sorted({str((one.cfg or {}).get("dataset_name")) for one in found} - {"None"})
    many = f" (its parts {', '.join(parts[:3])}{f' and {len(parts) - 3} more' if len(parts) > 3 else ''})"
    files = ", ".join(f"{split}: /where/you/put/{split}.jsonl" for split in splits)
    return (
        f"--tasks {name}: the dataset {path}{many if parts else ''} is needed, and it could neither be fetched nor "
        f"found in the cache ({said}). Either load it once on a machine with a network, "
        f'`python -c "import datasets; datasets.load_dataset({path!r}'
        f"{f', {parts[0]!r}' if parts else ''})\"`, and copy that machine's cache to {hub.HF_DATASETS_CACHE} here "
        "(HF_HOME moves it). Or put its rows somewhere as JSON lines, and a file "
        f"{entry.name}.yaml in a folder that you give as --tasks-path, with:\n"
        f"  include: {entry.yaml_path}\n  task: {entry.name}\n  dataset_path: json\n  dataset_name: null\n"
        f"  dataset_kwargs: {{data_files: {{{files}}}}}"
    )


@contextmanager
def _repeatable() -> Iterator[None]:
    """Seeds what tasks draw from, as the harness's command does, and puts back what was there.

    The harness bootstraps in forked processes, which a process with JAX's threads must not be forked into: not here.
    """
    states, before = (random.getstate(), np.random.get_state()), os.environ.get("DISABLE_MULTIPROC")
    random.seed(_SEED)
    np.random.seed(_SHOTS_SEED)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
