"""The benchmarks' common file, the documentation that is written from it, and contests in which somebody fails."""

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from runs import ROOT

BENCHMARKS = ROOT / "benchmarks"

ENVELOPE = {
    "benchmark": "startup",
    "command": "python benchmarks/startup.py",
    "environment": {"XLA_FLAGS": "--some"},
    "arguments": {"recipe": "configs/quickstart.py", "repeat": 3},
    "date": "2026-11-20T12:00:00+00:00",
    "commit": "0123456789abcdef",
    "changed": [],
    "machine": {"cpu": "a processor", "cores": 2, "memory_gib": 23.5, "accelerator": None},
    "versions": {"python": "3.11.7", "jax": "0.10.2", "jaxlib": "0.10.2"},
    "peers": {"one": {"torch": "2.13.0", "python": "3.11.7"}, "other": {"torch": "2.13.0", "python": "3.11.7"}},
    "load": [0.123, 0.2, 0.3],
    "figures": {"help": [0.02, 0.03, 0.02], "cold": [9.5, 10.5, 10.0], "warm": [3.5]},
}
DOCUMENT = "# Speed\n\nPlain words.\n\n<!-- results/one.json -->\n<!-- end -->\n\nMore words.\n"


@pytest.fixture(autouse=True)
def _as_scripts_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def page() -> ModuleType:
    return importlib.import_module("page")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """docs/speed.md and results/one.json, which belong together."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "docs" / "speed.md").write_text(DOCUMENT)
    write(tmp_path, ENVELOPE)
    return tmp_path


def write(folder: Path, envelope: object) -> None:
    (folder / "results" / "one.json").write_text(json.dumps(envelope))


def test_every_benchmark_writes_the_common_file(page: ModuleType):
    helpers = {"record", "page", "blocks", "contest"}
    names = {path.stem for path in BENCHMARKS.glob("*.py")} - helpers
    for name in names:
        text = (BENCHMARKS / f"{name}.py").read_text()
        assert "= record.parser(__doc__)" in text, name
        assert f'record.begin("{name}", ' in text, name
    assert names <= set(importlib.import_module("blocks").RENDERERS)


def test_what_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record = importlib.import_module("record")
    monkeypatch.setattr(sys, "argv", ["/some/where/growth.py", "--rounds", "2", "--name", "two words"])
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/home")
    parser = record.parser("What it does")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path("a"))
    path = tmp_path / "new" / "growth.json"
    asked = parser.parse_args(["--rounds", "2", "--json", str(path)])
    record.begin("growth", asked).write({"exponent": 1.0}, {"peer": record.versions_of("numpy")})
    found = json.loads(path.read_text())
    assert list(found) == list(ENVELOPE)
    assert found["command"] == "python benchmarks/growth.py --rounds 2 --name 'two words'"
    assert found["environment"]["MALLOC_ARENA_MAX"] == "1"
    assert "JAX_COMPILATION_CACHE_DIR" not in found["environment"]
    assert found["arguments"] == {"rounds": 2, "folder": "a"}
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["accelerator"] is None
    assert found["versions"]["jax"] == importlib.metadata.version("jax")
    assert found["peers"]["peer"]["numpy"]
    assert found["figures"] == {"exponent": 1.0}
    record.begin("growth", parser.parse_args([])).write({}, {})  # nothing was asked for, and nothing is written


def test_the_documentation_is_what_the_results_give(page: ModuleType, capsys: pytest.CaptureFixture):
    assert page.main(["--check"]) == 0, capsys.readouterr().err


def test_a_block_is_written_and_prose_is_left(page: ModuleType, folder: Path):
    path = folder / "docs" / "speed.md"
    assert page.main(["--check"], folder / "docs", folder) == 1
    assert page.main([], folder / "docs", folder) == 0
    assert page.main(["--check"], folder / "docs", folder) == 0
    text = path.read_text()
    assert text.startswith(
        "# Speed\n\nPlain words.\n\n<!-- results/one.json -->\n\n| from nothing to | median | each |\n"
    )
    assert text.endswith("\n\n<!-- end -->\n\nMore words.\n")
    assert "| first step of `quickstart.py`, nothing compiled before | 10.00 s | 9.50, 10.50, 10.00 |" in text
    for told in ("2026-11-20", "a processor, 2 cores, 23.5 GiB", "0.1, 0.2, 0.3", "commit 0123456789", "jax 0.10.2"):
        assert told in text
    assert "torch 2.13.0 (one; other)" in text
    assert "`XLA_FLAGS=--some python benchmarks/startup.py`" in text


def test_drift_is_caught(page: ModuleType, folder: Path, capsys: pytest.CaptureFixture):
    page.main([], folder / "docs", folder)
    path = folder / "docs" / "speed.md"
    text = path.read_text()
    path.write_text(text.replace("10.00 s", "7.00 s"))
    assert page.main(["--check"], folder / "docs", folder) == 1
    assert "speed.md: the block of results/one.json is not what it gives" in capsys.readouterr().err
    path.write_text(text.replace("Plain words", "Other words"))
    assert page.main(["--check"], folder / "docs", folder) == 0
    write(folder, ENVELOPE | {"figures": ENVELOPE["figures"] | {"warm": [3.6]}})
    assert page.main(["--check"], folder / "docs", folder) == 1
    assert "results/one.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"benchmark": "unheard"}, "results/one.json: no table is known for benchmark 'unheard'"),
        ({"figures": {"help": [1.0]}}, "results/one.json: not what startup.py --json writes (KeyError('cold'))"),
        ({"figures": None}, "not what startup.py --json writes"),
        ({"machine": {}}, "not what startup.py --json writes"),
    ],
)
def test_a_result_of_something_else(
    page: ModuleType, folder: Path, capsys: pytest.CaptureFixture, change: dict[str, Any], message: str
):
    write(folder, ENVELOPE | change)
    for flags in ([], ["--check"]):
        assert page.main(flags, folder / "docs", folder) == 1
        assert message in capsys.readouterr().err
    assert (folder / "docs" / "speed.md").read_text() == DOCUMENT


@pytest.mark.parametrize("content", ["{", "[]", '{"benchmark": ["a", "list"]}', ""])
def test_a_result_that_is_none(page: ModuleType, folder: Path, capsys: pytest.CaptureFixture, content: str):
    (folder / "results" / "one.json").write_text(content)
    assert page.main(["--check"], folder / "docs", folder) == 1
    assert "speed.md: results/one.json: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("<!-- results/two.json -->\n<!-- end -->\n", "no such file in"),
        ("<!-- results/../one.json -->\n<!-- end -->\n", "not the name of a result"),
        ("<!-- results/one -->\n<!-- end -->\n", "not the name of a result"),
        ("<!-- results/one.json -->\n", "results/one.json: its block has no <!-- end -->"),
        ("<!-- results/one.json -->\n<!-- results/one.json -->\n<!-- end -->\n", "has no <!-- end --> before"),
        ("words\n<!-- end -->\n", "<!-- end --> without a block"),
    ],
)
def test_a_document_that_cannot_be_written(
    page: ModuleType, folder: Path, capsys: pytest.CaptureFixture, document: str, message: str
):
    (folder / "docs" / "speed.md").write_text(document)
    assert page.main([], folder / "docs", folder) == 1
    assert message in capsys.readouterr().err
    assert (folder / "docs" / "speed.md").read_text() == document


FAKE = """
import json, sys, time
kind, steps = sys.argv[2], 0
if kind == "broken":
    raise MemoryError("no room")
if kind == "asleep":
    time.sleep(600)
print("a line of somebody's")
losses = [3.0, 2.0, 1.0 if kind != "wrong" else 1.1]
print(json.dumps({"losses": losses, "seconds_to_first_step": 1.5, "versions": {"made": "1"}}), flush=True)
for line in sys.stdin:
    if line.strip() == "end":
        break
    steps += 1
    if kind == "dies" and steps == 2:
        sys.stderr.write("x" * 200_000 + chr(10) + "RuntimeError: RESOURCE_EXHAUSTED: no memory" + chr(10) + "bye")
        sys.exit(1)
    print(json.dumps({"seconds": 0.5 if kind == "slow" else 0.25}), flush=True)
print(json.dumps({"peak_bytes": 1 << 30}), flush=True)
"""


def contested(tmp_path: Path, kinds: dict[str, str], passes: int, patience: float = 60) -> Any:
    """A contest of processes that only say that they train."""
    contest = importlib.import_module("contest")
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    entries = [contest.Entry(name, str(script), (kind,), sys.executable) for name, kind in kinds.items()]
    held = contest.Contest(tmp_path, entries, contest.Turns(rounds=4, passes=passes, patience=patience), "float32")
    held.run()
    return held


@pytest.mark.parametrize("passes", [0, 2])
def test_who_fails_is_named_and_the_rest_go_on(page: ModuleType, tmp_path: Path, passes: int):
    kinds = {"meshgpt": "fine", "a": "broken", "b": "wrong", "c": "dies", "d": "slow"}
    held = contested(tmp_path, kinds, passes)
    assert list(held.results) == ["meshgpt", "d"]
    assert held.results["d"].seconds == [0.5] * 4
    assert held.results["d"].peak_bytes == 1 << 30
    assert held.out["a"] == "MemoryError: no room"
    assert held.out["b"].startswith("its losses differ: [3.0, 2.0, 1.1]")
    assert held.out["c"] == "RuntimeError: RESOURCE_EXHAUSTED: no memory"
    compare = importlib.import_module("compare")
    rows = compare.figures(held, compare.Work(tokens=100, flops=1e9, peak=8e9))
    assert [row["times_ours"] for row in rows] == [1.0, 2.0]
    assert [row["mfu"] for row in rows] == [0.5, 0.25]
    compare.show(rows)
    shape = {"family": "gpt2", "layers": 2, "width": 64, "vocab": 100, "rows": 2, "length": 50, "dtype": "float32"}
    shape |= {"unroll": 0, "remat": "none", "checkpointing": False}
    comparisons = {"comparisons": [{"shape": shape, "contestants": rows, "out": held.out}]}
    write_here = tmp_path / "results"
    write_here.mkdir()
    write(tmp_path, ENVELOPE | {"benchmark": "compare", "figures": comparisons})
    text = page.block("results/one.json", tmp_path)
    assert "| d | 500 ms (500 to 500) | 200 | 25.0% | 1.00 GiB | 1.5 s | 2.00x |" in text
    assert "a (`MemoryError: no room`)" in text


def test_without_ours_the_peers_are_still_measured(tmp_path: Path):
    held = contested(tmp_path, {"meshgpt": "broken", "d": "slow"}, passes=0)
    compare = importlib.import_module("compare")
    rows = compare.figures(held, compare.Work(tokens=100, flops=1e9, peak=None))
    compare.show(rows)
    assert [(row["name"], row["times_ours"], row["mfu"]) for row in rows] == [("d", None, None)]


def test_patience_ends(tmp_path: Path):
    held = contested(tmp_path, {"meshgpt": "fine", "a": "asleep"}, passes=0, patience=3)
    assert list(held.results) == ["meshgpt"]
    assert held.out == {"a": "not ready within 3 s"}


def test_one_command_runs_the_gpu_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record, compare = importlib.import_module("record"), importlib.import_module("compare")
    monkeypatch.setattr(record, "device", lambda: {"platform": "gpu", "kind": "NVIDIA H200", "count": 1})
    (tmp_path / "model.py").write_text("")
    args = compare.parse(["--suite", "gpu", "--nanogpt", str(tmp_path)])
    shapes = compare.shapes(args)
    assert [(shape.name, shape.rows, shape.length) for shape in shapes] == [
        ("124m", 64, 1024), ("355m", 32, 1024), ("774m", 16, 1024), ("1.5b", 16, 1024), ("gptj-6b", 4, 2048),
        ("gptj-6b", 8, 2048),
    ]  # fmt: skip
    assert {(shape.dtype, shape.platform) for shape in shapes} == {("bfloat16", "gpu")}
    assert args.passes > 0
    names = [entry.name for entry in compare.entries(shapes[0], args)]
    assert {"meshgpt", "nanoGPT, torch.compile", "nanoGPT without biases, torch.compile"} < set(names)
    with pytest.raises(SystemExit):
        compare.parse(["--nanogpt", str(tmp_path / "none")])


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        [
            "train_step",
            "--layers",
            "1",
            "--width",
            "32",
            "--heads",
            "2",
            "--batch",
            "1",
            "--seq",
            "16",
            "--rounds",
            "2",
        ],
        ["generate", "--layers", "1", "--width", "32", "--heads", "2", "--new-tokens", "4", "--rounds", "2"],
        ["data", "--rows", "2", "--seq-len", "64", "--seconds", "0.1", "--sources", "2"],
    ],
    ids=lambda words: words[0],
)
def test_a_benchmark_writes_what_its_table_reads(page: ModuleType, tmp_path: Path, words: list[str]):
    (tmp_path / "results").mkdir()
    command = [sys.executable, str(BENCHMARKS / f"{words[0]}.py"), *words[1:]]
    command += ["--json", str(tmp_path / "results" / "one.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "| " in page.block("results/one.json", tmp_path)
