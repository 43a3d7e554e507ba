"""Where a training loop's time goes."""

import jax
import jax.numpy as jnp
import pytest

from meshgpt.distributed.heartbeat import EVALUATING, SAVING
from meshgpt.training.step_timer import COMPILING, DATA, Clock


def test_shares_of_a_loop():
    time = [0.0]
    clock = Clock(lambda: time[0])

    def spend(what: str, seconds: float) -> None:
        with clock.on(what):
            time[0] += seconds

    spend(COMPILING, 20.0)
    for _ in range(10):
        spend(DATA, 0.1)
        time[0] += 9.5
    spend(EVALUATING, 3.0)
    spend(SAVING, 1.0)
    assert clock.goodput == pytest.approx(0.95)
    assert str(clock) == (
        "of 1m40s in the loop, after 20s of compiling: training steps 95.0%, waiting for data 1.0%, evaluating 3.0%, "
        "saving 1.0%"
    )


def test_waiting_for_items_counts_and_changes_none():
    time = [0.0]
    clock = Clock(lambda: time[0])

    def slow():
        for item in range(4):
            time[0] += 1.0
            yield item

    taken = []
    for item in clock.waited(slow(), DATA):
        time[0] += 3.0
        taken.append(item)
    assert taken == [0, 1, 2, 3]
    assert clock.goodput == pytest.approx(0.75)


def test_what_an_evaluation_compiles_is_compiling_and_no_evaluation():
    with Clock() as clock:
        with clock.on(EVALUATING):
            jax.jit(lambda x: jnp.linalg.qr(x)[0] @ x)(jnp.ones((8, 8))).block_until_ready()
        assert clock._spent[COMPILING] > clock._spent[EVALUATING]
    before = clock._spent[COMPILING]
    jax.jit(lambda x: jnp.cos(x) @ x)(jnp.ones((8, 8))).block_until_ready()
    assert clock._spent[COMPILING] == before  # it has stopped listening
