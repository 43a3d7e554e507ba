"""The compiled step does no more arithmetic and moves no more bytes than it did: XLA's own count, against a record."""

import jax
import pytest
import step_costs

ALLOWED = 0.01  # either way: a step that became cheaper is recorded anew, and guarded at its new cost
AGAIN = "if it is meant, record it: python tests/step_costs.py"


@pytest.mark.parametrize("mesh", step_costs.MESHES)
@pytest.mark.parametrize("model", step_costs.MODELS)
def test_flops_and_bytes_of_a_step_are_those_recorded(model: str, mesh: str) -> None:
    record = step_costs.recorded().get(jax.__version__)
    if record is None:
        pytest.skip(f"nothing is recorded for jax {jax.__version__}: python tests/step_costs.py")
    found, wanted = step_costs.measure(model, mesh), record[step_costs.case(model, mesh)]
    for name, value in wanted.items():
        change = found[name] / value - 1
        assert abs(change) <= ALLOWED, f"{name}: {found[name]:.6g}, {change:+.1%} of the recorded; {AGAIN}"
