"""The trackers: what lands in the file and on the screen, after kills and resumes too."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console as RichConsole

from meshgpt.training.trackers import Console, JsonLines, Several, amount, duration, progress_bar, read_json_lines

METRICS = {"tokens": 4096, "loss": 3.25, "grad_norm": 0.5, "learning_rate": 1e-4, "tokens_per_second": 12_345.0}


def steps(path: Path) -> list[int]:
    """The steps in a file, read with the json module alone: every line must be whole."""
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def plain() -> tuple[RichConsole, io.StringIO]:
    out = io.StringIO()
    return RichConsole(file=out, force_terminal=False, width=200), out


class Clock:
    """Seconds that pass when told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_json_lines_writes_one_flushed_object_a_step(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    tracker = JsonLines(path)
    tracker.log(1, METRICS)
    tracker.log(2, METRICS | {"val_loss": 3.0})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, **METRICS},
        {"step": 2, **METRICS, "val_loss": 3.0},
    ]  # before close: a kill loses nothing
    tracker.close()


def test_json_lines_merges_calls_for_one_step_and_refuses_to_go_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonLines(path)
    tracker.log(1, {"loss": 2.0})
    tracker.log(2, {"loss": 1.123456789})
    tracker.log(2, {"loss": 1.0})
    tracker.log(2, {"val_loss": 1.5})
    tracker.log(3, {"loss": 0.5})
    tracker.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "val_loss": 1.5}, {"step": 3, "loss": 0.5}]
    resumed = JsonLines(path, resume_step=3)
    resumed.log(3, {"val_loss": 0.25})
    with pytest.raises(ValueError, match=r"step 2 was logged .* after step 3"):
        resumed.log(2, {"loss": 1.0})
    resumed.close()
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 3, "loss": 0.5, "val_loss": 0.25}


def test_json_lines_is_strict_json_for_nan_and_infinity(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonLines(path)
    tracker.log(1, {"loss": math.nan, "grad_norm": math.inf})
    tracker.close()

    def refuse(name: str):
        raise AssertionError(name)

    assert json.loads(path.read_text(), parse_constant=refuse) == {"step": 1, "loss": None, "grad_norm": None}


def test_json_lines_starts_afresh_without_a_step_to_resume_from(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        tracker = JsonLines(path)
        tracker.log(1, METRICS)
        tracker.close()
    assert steps(path) == [1]


@given(cut=st.integers(0, 400), resume=st.integers(0, 8), zeros=st.integers(0, 3))
def test_a_file_cut_anywhere_resumes_without_a_step_twice(tmp_path_factory, cut, resume, zeros):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    objects = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 8)]
    path.write_bytes("".join(text + "\n" for text in objects).encode()[:cut] + b"\0" * zeros)
    ends = [sum(len(text) + 1 for text in objects[:count]) for count in range(1, 8)]
    survivors = [step for step, end in enumerate(ends, 1) if cut >= end or (cut == end - 1 and not zeros)]
    tracker = JsonLines(path, resume_step=resume)
    tracker.log(resume + 1, METRICS)
    tracker.log(resume + 2, METRICS)
    tracker.close()
    assert steps(path) == [step for step in survivors if step <= resume] + [resume + 1, resume + 2]
    assert not list(path.parent.glob("*.tmp"))


def test_a_killed_writer_leaves_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, signal, sys; from pathlib import Path; from meshgpt.training.trackers import JsonLines\n"
        "tracker = JsonLines(Path(sys.argv[1]))\n"
        "for step in range(1, 51): tracker.log(step, {'loss': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert steps(path) == list(range(1, 51))


def test_read_json_lines_skips_what_is_no_measurement(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_json_lines(path) == []
    junk = b'[1]\n\xff\xfe\n{"step": "3"}\n{"step": true}\n'
    twice = b'{"step": 1, "loss": 2}\n{"step": 1, "loss": 3}\n'
    path.write_bytes(b'{"step": 2}\n' + junk + twice + b'{"step": 2, "a')
    assert read_json_lines(path) == [{"step": 1, "loss": 3}, {"step": 2}]


def test_console_prints_plain_lines_a_few_seconds_apart():
    console, out = plain()
    clock = Clock()
    tracker = Console(total_steps=100, console=console, clock=clock)
    for step in range(1, 101):
        clock.now += 1
        tracker.log(step, METRICS | {"mfu": 0.4123})
    tracker.message("saved [run]/checkpoints/100")
    tracker.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 22  # steps 1, 6, ..., 96, the last one, and the message
    assert lines[1] == "step 6/100  loss 3.2500  12.3k tokens/s  MFU 41.2%  ETA 1m34s"
    assert lines[-2] == "step 100/100  loss 3.2500  12.3k tokens/s  MFU 41.2%"
    assert lines[-1] == "saved [run]/checkpoints/100"


def test_console_always_shows_evaluations_and_skipped_steps():
    console, out = plain()
    tracker = Console(total_steps=9, console=console, clock=Clock())
    tracker.log(1, {"loss": 3.0})
    tracker.log(2, {"loss": math.nan, "val_loss": 1.2, "val_bits_per_byte": 2.5, "gzip_bits_per_byte": 1.75})
    tracker.log(9, {"loss": math.nan, "skipped_steps": 2})
    tracker.close()
    assert out.getvalue().splitlines() == [
        "step 1/9  loss 3.0000",
        "step 2  validation loss 1.2000  2.500 bits per byte (gzip -9: 1.750)",
        "step 9/9  loss nan  2 skipped",
    ]


def test_console_on_a_terminal_overwrites_steps_and_keeps_evaluations():
    out = io.StringIO()
    console = RichConsole(file=out, force_terminal=True, width=150, color_system=None)
    tracker = Console(total_steps=10, first_step=4, console=console, clock=Clock())
    tracker.log(5, METRICS)
    tracker.log(6, METRICS | {"val_loss": 2.0})
    tracker.close()
    text = out.getvalue()
    assert "step 6  validation loss 2.0000\n" in text
    assert "step 6/10  loss 3.2500" in text
    assert "\x1b[?25h" in text  # the cursor is back


def test_progress_bar_prints_plain_lines_where_there_is_no_terminal():
    console, out = plain()
    clock = Clock()
    with progress_bar(console, clock) as report:
        for done in range(21):
            report("tokenizing [a]", done * 1000, 20_000)
            clock.now += 1
        report("tokenizing [a]", 20_000, 20_000)
        report("counting", 5, None)
        clock.now += 6
        report("counting", 9, None)
    assert out.getvalue().splitlines() == [
        "tokenizing [a]  5,000/20,000 (25%)  ETA 15s",
        "tokenizing [a]  10,000/20,000 (50%)  ETA 10s",
        "tokenizing [a]  15,000/20,000 (75%)  ETA 5s",
        "tokenizing [a]  20,000/20,000 (100%)  done in 20s",
        "counting  9",
    ]


def test_progress_bar_draws_on_a_terminal():
    out = io.StringIO()
    console = RichConsole(file=out, force_terminal=True, width=100, color_system=None)
    with progress_bar(console) as report:
        report("reading [b]", 1, None)
        report("reading [b]", 3, 4)
        report("reading [b]", 4, 4)
    assert "reading [b]" in out.getvalue()
    assert "100%" in out.getvalue()


def test_several_reaches_every_tracker_in_order(tmp_path):
    console, out = plain()
    tracker = Several([JsonLines(tmp_path / "a.jsonl"), Console(5, console=console), JsonLines(tmp_path / "b.jsonl")])
    tracker.log(1, METRICS)
    tracker.message("hello")
    tracker.close()
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text() != ""
    assert out.getvalue().endswith("hello\n")


def test_importing_the_tracker_brings_neither_jax_nor_rich():
    brought = "any(name in sys.modules for name in ('jax', 'rich', 'tensorboardX'))"
    code = f"import sys, meshgpt.training.trackers; sys.exit({brought})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0s"), (8.4, "8s"), (59.6, "1m00s"), (247, "4m07s"), (11_100, "3h05m"), (187_200, "2d04h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.6, "1.00k"),
        (12_345, "12.3k"),
        (99_960, "100k"),
        (4.56e6, "4.56M"),
        (6.05e9, "6.05B"),
    ],
)
def test_amount(number, text):
    assert amount(number) == text
