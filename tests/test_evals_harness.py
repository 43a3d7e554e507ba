"""Tasks of the lm-evaluation-harness beside its own `hf` backend on the same exported weights."""

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import eval_peers
import pytest
import tiny
from eval_peers import GPT2, GPTJ, silent
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer
from scipy.stats import binomtest

from meshgpt.errors import MachineError, UserError
from meshgpt.evals import choices, harness
from meshgpt.evals.lm import Answers, harness_lm
from meshgpt.evals.perplexity import measure
from meshgpt.evals.results import Results

NAMES = ["local_hellaswag", "local_sciq", "local_plain", "local_wikitext", "local_lambada"]
REQUIRED = (
    *("piqa", "winogrande", "lambada_openai", "arc_easy", "arc_challenge", "sciq", "wsc", "hellaswag", "mmlu"),
    *("truthfulqa", "gsm8k", "drop", "wikitext"),
)


@pytest.fixture(scope="module", autouse=True)
def _quick_to_compile() -> Iterator[None]:
    with eval_peers.quick_to_compile():
        yield


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    """The harness's tasks and those of `eval_peers`."""
    return harness.open_tasks(eval_peers.make_tasks(tmp_path_factory.mktemp("evals") / "tasks"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("exports")
    return {tiny.name(config): eval_peers.export(config, base / tiny.name(config)) for config in (GPT2, GPTJ)}


def hf_backend(folder: Path) -> HFLM:
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)


def figures(results: Results) -> dict[tuple[str, str], float]:
    return {
        (task, key): value
        for task, values in results["results"].items()
        for key, value in values.items()
        if key.endswith(",none") and "_stderr" not in key
    }


@pytest.mark.parametrize(
    ("family", "mesh", "shots"), [("gpt2", (2, 2, 2), None), ("gptj", (1, 4, 2), 1)], ids=["gpt2", "gptj"]
)
def test_figures_are_those_of_the_hf_backend(
    local: TaskManager,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    mesh: tuple[int, int, int],
    shots: int | None,
) -> None:
    """Identical accuracies and perplexities to 1e-4; and the same figures without the harness."""
    with eval_peers.opened(folders[family], tiny.mesh(*mesh)) as (scorer, trained):
        found = harness.run(scorer, trained.tokenizer, harness.load(local, NAMES, shots), silent)
        questions = [choices.read_questions([("", row) for row in rows]) for rows in
                     (eval_peers.hellaswag_rows(24), eval_peers.plain_rows(24))]  # fmt: skip
        answered = [choices.choose(scorer, trained.tokenizer, each, silent) for each in questions]
        pages = eval_peers.wikitext_rows(4)
        read = measure(
            scorer, trained.tokenizer, [wikitext_detokenizer(page) for page in pages], silent,
            counted=[page["page"] for page in pages],
        )  # fmt: skip
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)  # it asks pip and the machine, for seconds
    reference = evaluator.simple_evaluate(
        hf_backend(folders[family]), tasks=NAMES, num_fewshot=shots, task_manager=local, bootstrap_iters=0,
        log_samples=False,
    )  # fmt: skip
    ours, theirs = figures(found), figures(reference)
    assert ours.keys() == theirs.keys()
    assert len({value for (_, key), value in ours.items() if key.startswith("acc")}) >= 4, "too alike to tell apart"
    for (task, key), value in theirs.items():
        assert ours[task, key] == (value if key.startswith("acc") else pytest.approx(value, rel=1e-4)), (task, key)
    assert found["n-shot"] == dict.fromkeys(NAMES, shots or 0)
    for figure, value in read.figures().items():
        if figure != "token_perplexity":
            assert value == pytest.approx(ours["local_wikitext", f"{figure},none"], rel=1e-6), figure
    if shots is None:
        for task, accuracy in zip(("local_hellaswag", "local_plain"), answered, strict=True):
            for figure in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
                assert getattr(accuracy, figure) == pytest.approx(found["results"][task][f"{figure},none"], rel=1e-12)


def generation(context: str, **settings: Any) -> Instance:
    return Instance(request_type="generate_until", doc={}, arguments=(context, settings), idx=0)


def test_generated_answers_are_those_of_the_hf_backend(folders: dict[str, Path]) -> None:
    """A short prompt and one that is cut; stop sequences that occur and that do not."""
    texts = [eval_peers.sentence(40000, 3), eval_peers.sentence(40001, 60)]
    peer = hf_backend(folders["gptj"])
    requests = [generation(text, until=[], max_gen_toks=40) for text in texts]
    free = peer.generate_until(requests)
    assert all(len(text) > 20 for text in free)
    requests += [generation(text, until=["never", answer[9:12]], max_gen_toks=40) for text, answer in
                 zip(texts, free, strict=True)]  # fmt: skip
    theirs = peer.generate_until(requests)
    with eval_peers.opened(folders["gptj"], tiny.mesh(2, 1, 2), batch_size=2) as (scorer, trained):
        said = []
        lm = harness_lm(Answers(scorer, trained.tokenizer, lambda *progress: said.append(progress)))
        ours = lm.generate_until(requests)
        (shorter,) = Answers(scorer, trained.tokenizer, silent, max_gen_toks=3).generate([requests[0].args])
    assert ours == theirs
    assert len(set(ours)) == 4
    assert said[-1] == ("generating", 4, 4)
    assert ours[0].startswith(shorter)
    assert len(shorter) < len(ours[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"until": [], "num_beams": 4}, "generation with num_beams=4, which meshgpt does not do"),
        ({"until": []}, "up to 256 generated tokens, and the model's context is 64: give --max-new-tokens 32"),
    ],
)
def test_generation_that_cannot_be_is_refused(folders: dict[str, Path], settings: dict, message: str) -> None:
    with eval_peers.opened(folders["gpt2"], tiny.mesh()) as (scorer, trained):
        answers = Answers(scorer, trained.tokenizer, silent)
        with pytest.raises(UserError, match=message):
            answers.generate([("the", settings)])


def test_the_named_tasks_are_the_harnesss_own(local: TaskManager) -> None:
    assert harness.resolve(local, REQUIRED) == list(REQUIRED)
    assert [len(harness.leaves(local, name)) for name in ("piqa", "mmlu", "truthfulqa")] == [1, 57, 3]
    for name in REQUIRED:
        for leaf in harness.leaves(local, name):
            assert local.task_index[leaf].cfg["dataset_path"], leaf


def test_patterns_and_repeated_names(local: TaskManager) -> None:
    assert harness.resolve(local, ["local_s*", "piqa", "local_sciq"]) == ["local_sciq", "piqa"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("helaswag", r"--tasks helaswag: there is no such task; the nearest names are hellaswag"),
        ("qqqqqqqqqqqqqq", r"--tasks qqqqqqqqqqqqqq: there is no such task\. `lm-eval ls tasks`"),
        ("zzz_*", r"--tasks zzz_\*: there is no such task"),
    ],
)
def test_an_unknown_task_gets_the_nearest_names(local: TaskManager, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        harness.resolve(local, [name])


def test_a_folder_without_tasks_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--tasks-path .* holds no \.yaml file"):
        harness.open_tasks(tmp_path)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    real = datasets.load_dataset

    def load(path: str, *arguments: Any, **settings: Any) -> Any:
        if path != "json":
            raise ConnectionError(f"Couldn't reach {path!r} on the Hub (LocalEntryNotFoundError)")
        return real(path, *arguments, **settings)

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.mark.usefixtures("no_network")
def test_without_network_the_message_says_which_files_and_works(local: TaskManager, tmp_path: Path) -> None:
    """What it says to write is written, and the task then runs under its own name."""
    with pytest.raises(MachineError) as refused:
        harness.load(local, ["hellaswag"])
    said = str(refused.value)
    assert "the dataset Rowan/hellaswag is needed" in said
    assert "Couldn't reach 'Rowan/hellaswag'" in said
    assert f"copy that machine's cache to {datasets.config.HF_DATASETS_CACHE}" in said
    data = eval_peers.write_lines(tmp_path / "validation.jsonl", eval_peers.hellaswag_rows(5))
    wanted = said.split("with:\n")[1].replace("/where/you/put/train.jsonl", str(data))
    (tmp_path / "hellaswag.yaml").write_text(wanted.replace("/where/you/put/validation.jsonl", str(data)))
    own = TaskManager(include_path=str(tmp_path), include_defaults=False)
    assert len(harness.load(own, ["hellaswag"])["tasks"]["hellaswag"].eval_docs) == 5


@pytest.mark.usefixtures("no_network")
def test_of_a_group_without_network_the_parts_are_named(local: TaskManager) -> None:
    with pytest.raises(MachineError, match=r"cais/mmlu \(its parts abstract_algebra, anatomy, astronomy and 54 more\)"):
        harness.load(local, ["mmlu"])


def test_a_local_task_that_is_not_right_is_named(tmp_path: Path) -> None:
    eval_peers.local_task(tmp_path, "gone", "sciq/sciq.yaml", "validation", eval_peers.sciq_rows(2))
    (tmp_path / "gone.jsonl").unlink()
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    with pytest.raises(UserError, match=r"--tasks gone: the task in .*gone\.yaml cannot be loaded .*gone\.jsonl"):
        harness.load(tasks, ["gone"])


def test_a_task_that_runs_what_the_model_wrote_is_refused(tmp_path: Path) -> None:
    rows = eval_peers.sciq_rows(2)
    eval_peers.local_task(tmp_path, "unsafe", "sciq/sciq.yaml", "validation", rows, unsafe_code=True)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    with pytest.raises(UserError, match="--tasks unsafe: this task runs code that the model wrote"):
        harness.load(tasks, ["unsafe"])


def test_a_limit_takes_the_first_questions_and_every_time_the_same_shots(
    local: TaskManager, folders: dict[str, Path]
) -> None:
    drawn = random.random()
    random.seed(5)
    expected = random.random()
    random.seed(5)
    with eval_peers.opened(folders["gpt2"], tiny.mesh()) as (scorer, trained):
        loaded = harness.load(local, ["local_sciq"], 2)
        found, again = (harness.run(scorer, trained.tokenizer, loaded, silent, limit=6) for _ in range(2))
        other = harness.run(scorer, trained.tokenizer, harness.load(local, ["local_sciq"]), silent, limit=6)
    assert random.random() == expected != drawn, "the state of Python's generator is put back"
    assert found["n-samples"]["local_sciq"] == {"original": 24, "effective": 6}
    assert (found["config"]["model"], found["config"]["limit"]) == ("meshgpt", 6)
    right = round(found["results"]["local_sciq"]["acc,none"] * 6)
    wilson = binomtest(right, 6).proportion_ci(method="wilson")
    assert found["intervals"]["local_sciq"]["acc,none"] == pytest.approx((wilson.low, wilson.high))
    assert "samples" not in found
    assert found["results"] == again["results"]
    assert found["results"] != other["results"]
    assert json.dumps(found, default=str)
    assert logging.getLogger("lm_eval").level == logging.ERROR
