"""Sinks: TensorBoard's files, what Weights & Biases is told, and packages that are missing."""

import sys
import types

import pytest

from meshgpt.config import may_differ
from meshgpt.errors import UserError
from meshgpt.training.sinks import TensorBoard, WeightsAndBiases, open_sinks

METRICS = {"tokens": 4096, "loss": 3.25, "grad_norm": 0.5, "learning_rate": 1e-4, "tokens_per_second": 12_345.0}


class FakeRun:
    def __init__(self):
        self.logged, self.finished = [], False

    def log(self, data, step):
        self.logged.append((step, data))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A module of wandb's name that keeps what it is told; the calls are those of wandb 0.2x (docs/evaluation.md)."""
    module = types.ModuleType("wandb")
    calls, run = {}, FakeRun()
    monkeypatch.setattr(module, "Settings", dict, raising=False)
    monkeypatch.setattr(module, "init", lambda **options: (calls.update(options), run)[1], raising=False)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return calls, run


def test_tensorboard_events_hold_the_figures(tmp_path):
    tracker = TensorBoard(tmp_path)
    tracker.log(1, METRICS)
    tracker.close()
    (events,) = tmp_path.glob("events.out.tfevents.*")
    for name in METRICS:
        assert name.encode() in events.read_bytes()


def test_tensorboard_missing_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"pip install 'meshgpt\[tensorboard\]'"):
        TensorBoard(tmp_path)


def test_wandb_is_offline_unless_it_is_told_otherwise(tmp_path, wandb, monkeypatch):
    calls, run = wandb
    sink = WeightsAndBiases(tmp_path / "my run", {"steps": 5})
    sink.log(1, METRICS)
    sink.log(2, {"loss": 3.0})
    sink.message("not a figure")
    sink.close()
    assert run.logged == [(1, METRICS), (2, {"loss": 3.0})]
    assert run.finished
    assert (calls["mode"], calls["dir"], calls["name"]) == ("offline", str(tmp_path / "my run"), "my run")
    assert calls["config"] == {"steps": 5}
    first = calls["id"]
    monkeypatch.setenv("WANDB_MODE", "online")
    WeightsAndBiases(tmp_path / "my run", {})
    assert (calls["mode"], calls["id"]) == ("online", first)
    WeightsAndBiases(tmp_path / "another", {})
    assert calls["id"] != first


def test_wandb_missing_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'meshgpt\[wandb\]'"):
        open_sinks(("wandb",), tmp_path, {}, None)


def test_sinks_are_opened_once_each_in_the_order_asked(tmp_path, wandb):
    sinks = open_sinks(("wandb", "tensorboard", "wandb"), tmp_path, {}, 3)
    assert [type(sink) for sink in sinks] == [WeightsAndBiases, TensorBoard]
    sinks[1].close()
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert open_sinks((), tmp_path, {}, None) == []


def test_a_run_may_go_on_with_other_sinks():
    assert may_differ("sinks")
