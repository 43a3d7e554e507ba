"""How commands end."""

import os
import signal
import subprocess
import sys

import pytest

from meshgpt.errors import UserError, exit_code


def raising(error: BaseException):
    def command() -> None:
        raise error

    return command


def test_a_command_that_ends_well_gives_0():
    assert exit_code(lambda: None) == 0


def test_the_users_mistake_gives_2_and_one_line(capsys: pytest.CaptureFixture[str]):
    assert exit_code(raising(UserError("the value, and the remedy"))) == 2
    assert capsys.readouterr() == ("", "error: the value, and the remedy\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_unwind_without_a_traceback(number: signal.Signals, capsys: pytest.CaptureFixture[str]):
    before = signal.getsignal(signal.SIGTERM)
    put_away = []

    def command() -> None:
        try:
            signal.raise_signal(number)
        finally:
            put_away.append(True)

    assert exit_code(command) == 130
    assert put_away
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_code(raising(ZeroDivisionError()))


def test_a_reader_that_goes_away_is_no_error():
    program = "import sys; from meshgpt.cli import main; sys.exit(max(main(['--help']) for _ in range(999)))"
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", program], stdout=pipe, stderr=pipe, env=os.environ)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), said) == (141, b"")


@pytest.mark.parametrize(
    ("raised", "code"), [("UserError('no')", 2), ("MachineError('no')", 3), ("PortTakenError('no')", 4), ("", 2)]
)
def test_a_full_disk_under_the_output_does_not_change_the_exit_code(raised: str, code: int):
    script = f"""
import sys
from meshgpt.errors import MachineError, PortTakenError, UserError, exit_code
def command():
    {f"raise {raised}" if raised else "print('a line')"}
sys.exit(exit_code(command))
"""
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", script], stdout=full, stderr=full, check=False).returncode == code
