"""That a disturbed run has ended as an undisturbed one: its state, its history, and the text it was fed."""

import json
import zlib
from pathlib import Path

import jax
import numpy as np

from meshgpt.checkpoint.manager import restore_items
from meshgpt.distributed.mesh import MeshShape, make_mesh
from meshgpt.training.data import open_run
from meshgpt.training.program import Program
from meshgpt.training.run_folder import RunFolder
from meshgpt.training.trackers import read_json_lines
from meshgpt.trees import leaves_with_names


class DiffersError(Exception):
    """The disturbed run is not what the undisturbed one is; the message says in what."""


def same_state(run: Path, other: Path, tolerance: float) -> str:
    """Compares the newest checkpoints of two runs; gives what holds, in words.

    Args:
        tolerance: 0 asks for the same bits of everything: parameters, optimizer, counters. Otherwise the largest
            relative difference (Euclidean norm, over all parameters) that is passed.

    Raises:
        DiffersError: another step, or a difference beyond that.
    """
    step = RunFolder(run).read_run().last_step
    ours, theirs = (_state(folder, step) for folder in (run, other))
    if not tolerance:
        for name, value in ours.items():
            if value.tobytes() != theirs[name].tobytes():
                raise DiffersError(f"{name} of the final state differs")
        return f"the final state ({len(ours)} arrays) is that of the undisturbed run, bit for bit"
    names = [name for name in ours if name.startswith("params/")]
    apart, size = (
        float(np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in arrays)))
        for arrays in ([ours[name] - theirs[name] for name in names], [theirs[name] for name in names])
    )
    if not apart <= tolerance * size:
        raise DiffersError(f"the final parameters differ by {apart / size:.2g} of their norm (at most {tolerance:g})")
    return f"the final parameters differ from the undisturbed run's by {apart / size:.2g} of their norm"


def _state(folder: Path, step: int) -> dict[str, np.ndarray]:
    place = RunFolder(folder)
    with jax.set_mesh(make_mesh(MeshShape(), jax.devices()[:1])):
        abstract = Program(run=place.read_run()).abstract().items()
        state = restore_items(place.checkpoints, step, abstract)
        return {name: np.asarray(leaf) for name, leaf in leaves_with_names(state)}


def same_history(run: Path, other: Path, tolerance: float) -> str:
    """Compares the steps and losses of two runs' metrics; raises DiffersError."""
    ours, theirs = (
        {row["step"]: row["loss"] for row in read_json_lines(RunFolder(folder).metrics)} for folder in (run, other)
    )
    if ours.keys() != theirs.keys():
        raise DiffersError(f"the metrics have other steps: {sorted(ours.keys() ^ theirs.keys())[:5]}")
    for step, loss in theirs.items():
        if abs(ours[step] - loss) > tolerance * abs(loss):
            raise DiffersError(f"the loss of step {step} is {ours[step]}, and {loss} undisturbed")
    within = f", within {tolerance:g}" if tolerance else ""
    return f"the metrics have each of {len(ours):,} logged steps once, with the losses of the undisturbed run{within}"


def fed_once(run: Path, notes: Path) -> str:
    """Compares what all processes of a run noted with the order of its data; raises DiffersError.

    Every note must be the row of the run's order that it claims to be; each start must go on right after a step that
    was done before; and all rows of all steps must be among the notes.
    """
    configuration, data = open_run(run)
    batch, reached = configuration.global_batch, 0
    seen = np.zeros((configuration.last_step, batch), bool)
    expected: dict[int, list[int]] = {}
    for path in sorted(notes.iterdir()):
        previous = None
        for step, rows in _notes(path):
            if step not in expected:
                tokens = data.batches.rows(step - 1, range(batch))[0]
                expected[step] = [zlib.crc32(row.tobytes()) for row in tokens]
            if step > reached + 1 if previous is None else step != previous + 1:
                raise DiffersError(f"a process went from step {reached if previous is None else previous} to {step}")
            for row, digest in rows.items():
                if digest != expected[step][row]:
                    raise DiffersError(f"row {row} of step {step} was not what the order of the run says")
                seen[step - 1, row] = True
            previous = step
        reached = max(reached, previous or 0)
    if not seen.all():
        raise DiffersError(f"step {int(np.argwhere(~seen)[0][0]) + 1} was not fed whole")
    return f"{seen.size:,} sequences of {configuration.last_step:,} steps, each the one that the run's order has there"


def _notes(path: Path) -> list[tuple[int, dict[int, int]]]:
    """(step, {row: checksum of its tokens}); a last line that a kill cut short is left out."""
    notes = []
    for line in path.read_text(encoding="ascii").splitlines(keepends=True):
        if line.endswith("\n"):
            note = json.loads(line)
            notes.append((note["step"], {int(row): digest for row, digest in note["rows"].items()}))
    return notes
