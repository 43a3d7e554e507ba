"""Sessions: time and work over restarts, after kills, and in damaged files."""

import json

import pytest

from meshgpt.training.sessions import HEARTBEAT_SECONDS, Session, read_sessions

FACTS = {"devices": 8, "device_kind": "TPU v4", "processes": 2, "parameters": 1000, "flops_per_token": 6000}


class Clock:
    now = 50.0

    def __call__(self):
        return self.now


def test_restarts_add_up_and_a_kill_counts_to_the_last_heartbeat(tmp_path):
    path, clock = tmp_path / "sessions.json", Clock()
    killed = Session(path, 0, FACTS, clock)
    for step in range(1, 8):
        clock.now += 4
        killed.log(step, {"loss": 1.0})
    (seen,) = read_sessions(path)
    assert seen["last_step"] in (5, 6)
    assert 28 - HEARTBEAT_SECONDS < seen["seconds"] <= 28
    again = Session(path, 4, FACTS | {"devices": 4}, clock)
    clock.now += 2.5
    again.log(5, {})
    again.message("no figure")
    again.close()
    first, second = read_sessions(path)
    assert first == seen
    assert (second["first_step"], second["last_step"], second["seconds"], second["devices"]) == (4, 5, 2.5, 4)
    assert second["started"] <= second["seen"]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("text", ["", "[", "{}", "null", "[1, null, {}]", '[{"device_kind": 3}]'])
def test_what_is_damaged_is_left_out(tmp_path, text):
    path = tmp_path / "sessions.json"
    path.write_text(text)
    assert read_sessions(path) == []
    Session(path, 0, FACTS)
    assert len(read_sessions(path)) == 1
    good = json.loads(path.read_text())
    bad = [{**good[0], "seconds": value} for value in (None, True, "9", -1.0)]
    path.write_text(json.dumps([*bad, *good]))
    assert read_sessions(path) == good
