"""Multiple choice from a file in HellaSwag's form, scored without the harness as the harness scores it.

A line is a JSON object with `ctx`, `endings` and `label`, the number of the right ending from 0 (or that number as
text). The request for an ending is the context, a space and the ending. A line that also has `activity_label` is one of
HellaSwag's own, and is put as the harness's task `hellaswag` puts it.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from meshgpt.data.tokenizer import Tokenizer
from meshgpt.errors import UserError
from meshgpt.evals.requests import Request, pair_requests
from meshgpt.evals.scoring import Progress, Scorer


@dataclasses.dataclass(frozen=True)
class Question:
    """A context, its endings, and which of them is right."""

    context: str
    endings: tuple[str, ...]
    label: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Shares of questions.

    acc: where the right ending has the highest log-likelihood ln p(ending | context).
    acc_norm: where it has the highest log-likelihood divided by its number of characters.
    acc_stderr, acc_norm_stderr: sqrt(acc (1 - acc) / (n - 1)) of n questions, None of a single one.
    """

    acc: float
    acc_norm: float
    questions: int

    @property
    def acc_stderr(self) -> float | None:
        return self._stderr(self.acc)

    @property
    def acc_norm_stderr(self) -> float | None:
        return self._stderr(self.acc_norm)

    def _stderr(self, share: float) -> float | None:
        return math.sqrt(share * (1 - share) / (self.questions - 1)) if self.questions > 1 else None


def read_questions(lines: Sequence[tuple[str, Any]]) -> list[Question]:
    """The questions of a file's lines, each (where it stands, its object).

    Raises:
      UserError: a field that is missing or of another kind, or a label without its ending; names the line.
    """
    return [_question(where, row) for where, row in lines]


def requests_of(tokenizer: Tokenizer, questions: Sequence[Question]) -> list[Request]:
    """What is scored: each ending of each question, in order."""
    pairs = [(question.context, f" {ending}") for question in questions for ending in question.endings]
    return pair_requests(tokenizer, pairs)


def choose(scorer: Scorer, tokenizer: Tokenizer, questions: Sequence[Question], report: Progress) -> Accuracy:
    """How many of the questions the model answers rightly. Of equal endings the first counts as chosen."""
    scores = iter(scorer.score(requests_of(tokenizer, questions), report, "multiple choice"))
    right = right_norm = 0
    for question in questions:
        nats = np.array([next(scores).log_likelihood for _ in question.endings])
        characters = np.array([float(len(ending)) for ending in question.endings])
        right += int(np.argmax(nats) == question.label)
        right_norm += int(np.argmax(nats / characters) == question.label)
    count = len(questions)
    return Accuracy(acc=right / count, acc_norm=right_norm / count, questions=count)


def _question(where: str, row: Any) -> Question:
    fields = row.keys() if isinstance(row, dict) else set()
    missing = [name for name in ("ctx", "endings", "label") if name not in fields]
    if missing:
        raise UserError(f"{where} has no field {missing[0]!r}: a line is an object with ctx, endings and label")
    context, endings, label = row["ctx"], row["endings"], row["label"]
    if not isinstance(context, str) or not isinstance(endings, list) or len(endings) < 2 or not all(
        isinstance(ending, str) and ending for ending in endings
    ):  # fmt: skip
        raise UserError(f"{where}: ctx has to be a text, and endings a list of at least two texts that are not empty")
    if not re.fullmatch(r"\d+", str(label)) or int(label) >= len(endings):
        raise UserError(f"{where}: label {label!r} is no ending; they are numbered from 0 to {len(endings) - 1}")
    if isinstance(row.get("activity_label"), str):
        if not all(isinstance(row.get(name, ""), str) for name in ("ctx_a", "ctx_b")):
            raise UserError(f"{where}: ctx_a and ctx_b, where they are given, have to be texts")
        context, endings = _as_the_harness(row), [_cleaned(ending) for ending in endings]
        if not all(endings):
            raise UserError(f"{where}: nothing is left of an ending without what it has in brackets")
    return Question(context, tuple(endings), int(label))


def _as_the_harness(row: dict[str, Any]) -> str:
    """The context of lm_eval/tasks/hellaswag/utils.py."""
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}" if "ctx_a" in row and "ctx_b" in row else row["ctx"]
    return _cleaned(f"{row['activity_label']}: {context}")


def _cleaned(text: str) -> str:
    """Without the marks that WikiHow's part of HellaSwag has in brackets."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
