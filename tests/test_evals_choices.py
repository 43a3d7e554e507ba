"""Multiple choice from a file. That its figures are the harness's own is in test_evals_harness.py."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from eval_peers import hellaswag_rows, plain_rows
from lm_eval.tasks.hellaswag.utils import process_docs

import meshgpt.evals.choices as module
from meshgpt.errors import UserError
from meshgpt.evals.choices import Accuracy, Question, choose, read_questions
from meshgpt.evals.files import read_json_lines, read_texts, stem
from meshgpt.evals.requests import Request
from meshgpt.evals.scoring import Score

RIGHT = {"ctx": "It was", "endings": ["red", "blue", "green"], "label": 1}


class Mapped(list):
    """As much of a dataset as the harness's function needs."""

    def map(self, function: Any) -> list:
        return [function(row) for row in self]


def test_rows_of_hellaswag_are_put_as_the_harness_puts_them() -> None:
    rows = hellaswag_rows(6)
    rows[1]["endings"][0] = "goes  on [title] then [step] ends "
    rows[2]["ctx_b"] = ""
    theirs = process_docs(Mapped(rows))
    ours = read_questions([("", row) for row in rows])
    assert ours == [Question(doc["query"], tuple(doc["choices"]), doc["gold"]) for doc in theirs]


def test_other_rows_are_put_as_they_are() -> None:
    (row,) = plain_rows(1)
    assert read_questions([("", row)]) == [Question(row["ctx"], tuple(row["endings"]), row["label"])]
    assert read_questions([("", RIGHT | {"label": "2"})])[0].label == 2


class Told:
    """A scorer that gives these log-likelihoods, in order."""

    def __init__(self, *values: float) -> None:
        self.values = values

    def score(self, requests: list[Request], report: Any, label: str) -> list[Score]:
        del report, label
        assert len(requests) == len(self.values)
        return [Score(value, False) for value in self.values]


def test_acc_takes_the_likeliest_and_acc_norm_the_likeliest_for_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "pair_requests", lambda tokenizer, pairs: [Request([0, 1], 1) for _ in pairs])
    questions = [
        Question("", ("a", "bbbbbbbbbb"), 0),  # -1 > -2 ; -1 < -0.2
        Question("", ("a", "bbbbbbbbbb"), 1),
        Question("", ("cc", "dd"), 0),  # of equal ones the first
        Question("", ("éé", "abc"), 0),  # characters, not bytes: -1.5 < -4/3
    ]
    told: Any = Told(-1, -2, -1, -2, -3, -3, -3, -4)
    found = choose(told, None, questions, lambda *progress: None)  # type: ignore[arg-type]
    assert (found.acc, found.acc_norm, found.questions) == (3 / 4, 2 / 4, 4)
    assert found.acc_norm_stderr == pytest.approx(math.sqrt(0.25 / 3))
    assert Accuracy(acc=1.0, acc_norm=1.0, questions=1).acc_stderr is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"ctx": "a", "endings": ["b", "c"]}, "has no field 'label': a line is an object with ctx, endings and label"),
        (["ctx", "endings", "label"], "has no field 'ctx'"),
        (RIGHT | {"ctx": 3}, "ctx has to be a text"),
        (RIGHT | {"endings": ["one"]}, "endings a list of at least two texts"),
        (RIGHT | {"endings": ["one", ""]}, "that are not empty"),
        (RIGHT | {"endings": "ab"}, "endings a list"),
        (RIGHT | {"label": 3}, "label 3 is no ending; they are numbered from 0 to 2"),
        (RIGHT | {"label": -1}, "label -1 is no ending"),
        (RIGHT | {"label": "b"}, "label 'b' is no ending"),
        (RIGHT | {"label": None}, "label None is no ending"),
        (RIGHT | {"activity_label": "x", "endings": ["one", "[all of it]"]}, "nothing is left of an ending"),
    ],
)
def test_a_line_that_is_not_right_is_named(row: Any, message: str) -> None:
    with pytest.raises(UserError, match="file.jsonl:7.*" + message.replace("[", r"\[")):
        read_questions([("file.jsonl:7", row)])


def test_files_of_lines_are_read_plain_and_compressed(tmp_path: Path) -> None:
    import gzip

    text = json.dumps(RIGHT) + "\n\n" + json.dumps(RIGHT | {"text": "a\u2028b"}, ensure_ascii=False) + "\n"
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("a.jsonl", "b.jsonl.gz"):
        places = [where.rpartition(":")[2] for where, _ in read_json_lines(tmp_path / name)]
        assert places == ["1", "3"]
    assert (stem(tmp_path / "a.jsonl"), stem(tmp_path / "b.jsonl.gz")) == ("a", "b")


def test_texts_are_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read_texts(tmp_path / "a.txt", "text") == ["one\n\ntwo\n"]
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    assert read_texts(tmp_path / "a.jsonl", "text") == ["one", "two"]
    with pytest.raises(UserError, match=r"a\.jsonl:1 has no field 'page'.*--field"):
        read_texts(tmp_path / "a.jsonl", "page")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"{}\n{", r"a\.jsonl:2 is not valid JSON"),
        ("a.jsonl", b"\n", r"a\.jsonl holds no lines"),
        ("a.txt", b"", r"a\.txt holds no text"),
        ("a.txt", b"ab\xff", r"a\.txt is not UTF-8 \(invalid start byte at byte 2\): convert it"),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz is damaged"),
        ("gone.txt", None, r"gone\.txt is no file"),
    ],
)
def test_a_file_that_is_not_right_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_texts(path, "text") if name.endswith(".txt") else read_json_lines(path)
