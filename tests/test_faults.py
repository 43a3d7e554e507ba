"""Whose fault an error is: the user's ends a supervised run, the machine's is tried again."""

import errno
import json
from pathlib import Path

import fake_run
import pytest
from test_supervisor import Launched

from meshgpt.cli import quantize
from meshgpt.data import streams
from meshgpt.data.prepare import Prepare, prepare
from meshgpt.data.store import Split
from meshgpt.errors import MachineError, UserError, exit_code, explained
from meshgpt.training import loop
from meshgpt.training.run_folder import RunFolder

MACHINES = [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.ENETUNREACH,
            errno.EHOSTUNREACH, errno.EREMOTEIO, errno.ENODEV, errno.EBUSY]  # fmt: skip
USERS = [errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT]


def failing(error: Exception):
    def fail(*_: object, **__: object):
        raise error

    return fail


@pytest.mark.parametrize("number", [*MACHINES, *USERS])
def test_a_number_says_whose_fault_it_is(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    error = explained(OSError(number, "said"), "cannot read it")
    assert isinstance(error, MachineError if number in MACHINES else UserError)
    assert exit_code(failing(error)) == (3 if number in MACHINES else 2)
    assert "error: cannot read it" in capsys.readouterr().err


def test_what_has_no_number_is_of_the_network_unless_its_kind_says_a_path() -> None:
    for error in (OSError("reset"), ConnectionError("no route"), TimeoutError("late")):
        assert isinstance(explained(error, ""), MachineError)
    for error in (FileNotFoundError("no such data set"), PermissionError("gated")):
        assert isinstance(explained(error, ""), UserError)


def test_a_disk_that_fails_is_not_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> None:
        with streams.open_stream(str(tmp_path / "gone.txt"), "gone.txt", 3) as (stream, _):
            stream.read()

    with pytest.raises(UserError, match=r"cannot read .*gone\.txt"):
        read()
    monkeypatch.setattr(streams, "open_path", failing(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(MachineError, match=r"cannot read .*gone\.txt: Input/output error"):
        read()
    monkeypatch.setattr(Path, "mkdir", failing(OSError(errno.ESTALE, "Stale file handle")))
    with (
        pytest.raises(MachineError, match="cannot write to the run's folder"),
        RunFolder(tmp_path / "run").claimed(fake_run.run(), "", print),
    ):
        pass


@pytest.mark.parametrize(("number", "lives"), [(errno.EIO, 2), (errno.ENOENT, 1)])
def test_the_supervisor_starts_again_after_the_machines_fault_alone(tmp_path: Path, number: int, lives: int) -> None:
    fault = (
        "if (life, step, number) == (0, 3, 0):\n"
        "    from meshgpt.errors import exit_code, explained\n"
        "    def fail():\n"
        f"        raise explained(OSError({number}, 'x'), 'cannot read the store')\n"
        "    sys.exit(exit_code(fail))"
    )
    launched = Launched(tmp_path, fault, processes=1)
    assert launched.supervisor.run() == (0 if lives == 2 else 2)
    assert len(launched.begun) == lives
    assert ("not restarted" in " ".join(launched.said)) == (lives == 1)


def test_a_run_without_a_folder_does_not_take_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"Run\.run_dir is empty"):
        loop.train(fake_run.run(store="x"))
    assert not list(tmp_path.iterdir())


def test_held_out_text_is_read_until_its_tokens_are_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "".join(json.dumps({"text": f"document {n} " + "word other " * 20}) + "\n" for n in range(300))
    (tmp_path / "a.jsonl").write_text(rows)
    request = Prepare(sources=(str(tmp_path / "a.jsonl"),), out=str(tmp_path / "store"), train_tokenizer="bpe",
                      vocab_size=300, val_fraction=0.5, workers=1)  # fmt: skip
    store = prepare(request, lambda label, done, total: None)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.ledger.write_text(json.dumps([{"store": str(store.folder)}] * 2))
    val, read, whole = store.split("val"), [], Split.tokens

    def tokens(self: Split, start: int, stop: int):
        read.append((start, stop))
        return whole(self, start, stop)

    monkeypatch.setattr(Split, "tokens", tokens)
    spent = val.document_range(3)[1] + 5
    monkeypatch.setattr(quantize, "_HELD_OUT_TOKENS", spent)
    ((name, texts),) = quantize._held_out(folder).items()
    assert name == f"held-out text (a try: {spent:,} of {2 * val.num_tokens:,} tokens)"
    assert len(texts) == len(read) == 5
    assert read[-1] == (val.document_range(4)[0], spent)
    monkeypatch.setattr(quantize, "_HELD_OUT_TOKENS", 10**9)
    assert set(quantize._held_out(folder)) == {"held-out text"}
