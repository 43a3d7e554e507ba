"""Checkpoints: saved by orbax without stopping the run, used again only after every file matched its digest.

`<folder>/<step>/` is orbax's, one item for each top-level entry of the state, so that `params` can be read alone.
`<folder>/<step>.digests.json` is ours and is written last: a step without it, or that differs from it, is not used.

Orbax's AsyncCheckpointer is used directly, not its CheckpointManager: that one deletes old steps before the new one has
its digests, counts damaged steps as kept ones, and skips a save it finds unnecessary.
"""

import errno
import functools
import json
import logging
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import jax
import orbax.checkpoint as ocp

from meshgpt.checkpoint import manifest, orbax_io, shared_digests
from meshgpt.distributed import processes
from meshgpt.errors import UserError
from meshgpt.settings import settings
from meshgpt.trees import Tree

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

_LONG_CHECK_BYTES = 4 * 10**9
_LONG_WAIT_SECONDS = 1.0
_LOOK_SECONDS = 2.0  # between two looks at whether a save makes progress
_MUCH_BYTES = 1 << 20  # written between two looks: more than signs of life and logs are
_LEAVING_SECONDS = 5.0
_WRITING_SECONDS = 7 * 24 * 3600  # orbax gives up on a save after 20 minutes, however much is written meanwhile
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NONE, _DAMAGED = -1, -2  # in place of a step, where process 0 tells the others
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}


@settings("checkpointing")
class Checkpointing:
    """How often checkpoints are saved and which are kept. Steps are optimizer steps."""

    every: int = 500
    """Steps between checkpoints."""
    keep: int = 2
    """Number of the newest checkpoints that are kept."""
    keep_every: int | None = None
    """Keep the checkpoints of steps divisible by this for good; it must be a multiple of `every`, and None keeps
    none."""

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"checkpointing.{name} is {getattr(self, name)}: it must be 1 or more")
        if self.keep_every is not None and (self.keep_every < 1 or self.keep_every % self.every):
            raise UserError(
                f"checkpointing.keep_every is {self.keep_every}, which is not a multiple of checkpointing.every "
                f"({self.every}): no such step would be saved; try {self.every * 10}"
            )


class Checkpointer:
    """The one writer of a checkpoint folder. Readers use `latest_step`, `restore_params` and `read_metadata`.

    With several processes each calls every method; all make and check digests, each of its part of the files, and
    process 0 writes the manifest and deletes old steps. A save is complete on all of them at the same time.
    """

    def __init__(
        self,
        folder: Path,
        config: Checkpointing,
        *,
        report: Callable[[str], None],
        alive: Callable[[], None] = lambda: None,
    ):
        """Removes what an interrupted save left in `folder`.

        Args:
            report: receives one line for the user at a time.
            alive: is called in this thread while what it waits for makes progress, which may take longer than a
                supervisor is patient.
        """
        self._folder = folder.absolute()
        self._config = config
        self._report, self._alive = report, alive
        self._thread: threading.Thread | None = None
        self._progress = threading.Event()  # of the save under way, since `wait` last looked
        self._failure: Exception | None = None
        self._at: int | None = None  # the step that the folder is known to hold: last saved or restored
        self._verified: set[int] = set()
        self._damaged: set[int] = set()
        _silence_orbax()
        if jax.process_index() == 0:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                _remove_leftovers(self._folder)
            except OSError as error:
                _raise_explained(error, self._folder)
        processes.meet()
        patient = ocp.options.AsyncOptions(timeout_secs=_WRITING_SECONDS)
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=patient)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or jax.process_count() == 1:
            self.close()
        elif self._thread is not None:  # the others may never come to where this save waits for them
            self._thread.join(_LEAVING_SECONDS)

    def save(self, step: int, state: Tree, metadata: Mapping[str, JSON]) -> None:
        """Copies `state` off the devices and returns; writing, digests and deletion go on in the background.

        Never skipped: it waits for a save still under way, and says so when that takes long. What an abandoned or
        damaged save left for the same step is replaced; the step last saved or restored here is left as it is.
        Steps only grow: a later step left by an abandoned branch would be taken for the newest at the next start.

        Args:
            state: arrays in nested dicts, sequences, NamedTuples or registered dataclasses; `state["params"]` or
                `state.params` is what `restore_params` reads.
            metadata: what a reader needs beside the arrays, such as the resolved configuration.

        Raises:
            UserError: this save, or the one before it, met a full disk or a folder that cannot be written.
        """
        started = time.monotonic()
        self.wait()
        waited = time.monotonic() - started
        if waited > _LONG_WAIT_SECONDS:
            self._report(f"waited {waited:.1f} s for the checkpoint before {step} (checkpointing.every is low)")
        if step == self._at:
            return
        metadata_args = {orbax_io.METADATA: ocp.args.JsonSave(dict(metadata))}
        items = ocp.args.Composite(**orbax_io.save_args(state), **metadata_args)
        try:
            if jax.process_index() == 0:
                _remove_step(self._folder, step)
            self._orbax.save(self._folder / str(step), args=items)
        except (OSError, ValueError) as error:
            _raise_explained(error, self._folder)
        self._at = step
        self._damaged.discard(step)
        self._verified.discard(step)
        name = f"meshgpt/digests/{processes.turn()}"  # here: the turns of a thread would not agree
        self._thread = threading.Thread(target=self._finish, args=(step, name), name="checkpoint digests", daemon=True)
        self._thread.start()

    def latest(self) -> int | None:
        """The newest intact step, or None in a fresh folder. Each newer one is reported with its damaged file.

        Every byte of the step is read once, by the processes together.

        Raises:
            UserError: steps were completed here and not one of them is intact.
        """
        self.wait()
        problem = UserError("no intact checkpoint: process 0 has the reason")

        def find(verify: Callable[[Path], None]) -> int:
            nonlocal problem
            try:
                found, self._damaged = _find_intact(self._folder, self._report, verify)
                return _NONE if found is None else found
            except UserError as error:
                problem = error
                return _DAMAGED

        newest = shared_digests.led(self._folder, find, self._alive)
        self._verified = {newest}
        if newest == _DAMAGED:
            raise problem
        return None if newest == _NONE else newest

    def restore(self, step: int, abstract_state: Tree) -> Tree:
        """The state saved at `step`, laid out as `abstract_state` asks, whatever the mesh it was saved from.

        Args:
            abstract_state: `jax.ShapeDtypeStruct` leaves in the structure of the state, or of some of its top-level
                entries. A leaf without a sharding is replicated over the current mesh.

        Raises:
            UserError: a file of the step is damaged, or a leaf's name, shape or dtype is not the checkpoint's.
        """
        self.wait()
        if step not in self._verified:
            self._verify(step)
        state = orbax_io.restore(self._folder / str(step), abstract_state)
        self._at = step
        return state

    def metadata(self, step: int) -> dict[str, JSON]:
        """What was given to `save` beside the state."""
        return read_metadata(self._folder, step)

    def steps(self) -> list[int]:
        """Steps whose save was completed, ascending; their files are not read."""
        return completed_steps(self._folder)

    def wait(self) -> None:
        """Returns when the last save is complete, digests included. Raises what went wrong with it, once."""
        if self._thread is not None:
            written = _written_bytes()
            while self._thread.is_alive():
                self._thread.join(_LOOK_SECONDS)
                before, written = written, _written_bytes()
                if self._progress.is_set() or written - before > _MUCH_BYTES:
                    self._progress.clear()
                    self._alive()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            self._at = None
            _raise_explained(failure, self._folder)

    def close(self) -> None:
        """Waits as `wait` does, and ends orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _verify(self, step: int) -> None:
        damage = "process 0 has the reason"

        def check(verify: Callable[[Path], None]) -> int:
            nonlocal damage
            try:
                verify(self._folder / str(step))
            except manifest.DamagedError as error:
                damage = str(error)
                return _DAMAGED
            return step

        if shared_digests.led(self._folder, check, self._alive) == _DAMAGED:
            raise _damaged_step(self._folder, step, damage)
        self._verified.add(step)

    def _finish(self, step: int, name: str) -> None:
        try:
            self._orbax.wait_until_finished()  # on all processes
            shared_digests.write_manifest(
                self._folder / str(step), name, then=lambda: self._delete_old(step), progress=self._progress.set
            )
        except Exception as failure:  # whatever it is, wait() raises it in the thread of the training loop
            self._failure = failure

    def _delete_old(self, step: int) -> None:
        """Deletes the steps before `step` that need not be kept. Damaged ones never count as kept."""
        good = [s for s in completed_steps(self._folder) if s <= step and s not in self._damaged]
        kept = set(good[-self._config.keep :])
        if self._config.keep_every is not None:
            kept |= {s for s in good if s % self._config.keep_every == 0}
        for old in _present(self._folder):
            if old < step and old not in kept:
                _remove_step(self._folder, old)


def latest_step(folder: Path, report: Callable[[str], None]) -> int | None:
    """`Checkpointer.latest` for a reader: changes nothing in `folder`, which a run may be writing to."""
    return _find_intact(folder.absolute(), report, manifest.verify)[0]


def restore_params(folder: Path, step: int, abstract_params: Tree) -> Tree:
    """The parameters alone, without reading the optimizer state. Their digests are checked by `latest_step`."""
    return restore_items(folder, step, {"params": abstract_params})["params"]


def restore_items(folder: Path, step: int, abstract_state: Tree) -> Tree:
    """The same of any top-level entries of the state, for a reader: changes nothing in `folder`."""
    _silence_orbax()
    return orbax_io.restore(folder.absolute() / str(step), abstract_state)


def read_metadata(folder: Path, step: int) -> dict[str, JSON]:
    """What was given to `Checkpointer.save` beside the state."""
    path = folder / str(step) / orbax_io.METADATA / orbax_io.METADATA
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): is {folder} the checkpoints folder of a run?") from error


def _find_intact(
    folder: Path, report: Callable[[str], None], verify: Callable[[Path], None]
) -> tuple[int | None, set[int]]:
    """The newest intact step, and the newer ones that were passed over."""
    passed_over: dict[int, str] = {}
    for step in reversed(_present(folder)):
        try:
            _announce_long_check(folder / str(step), report)
            verify(folder / str(step))
        except manifest.DamagedError as damage:
            passed_over[step] = str(damage)
            report(f"checkpoint {folder / str(step)} is passed over: {damage}")
            continue
        if passed_over:
            report(f"checkpoint {folder / str(step)} is intact and is used instead")
        return step, set(passed_over)
    completed = [step for step in _present(folder) if manifest.manifest_path(folder / str(step)).exists()]
    if completed:
        raise _damaged_step(folder, completed[-1], passed_over[completed[-1]])
    return None, set(passed_over)


def _written_bytes() -> int:
    """What this process has written so far; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/io").read_text().partition("wchar: ")[2].split()[0])
    except OSError:
        return 0


def _announce_long_check(folder: Path, report: Callable[[str], None]) -> None:
    if (size := manifest.size(folder)) > _LONG_CHECK_BYTES:
        report(f"checking the digests of {folder} ({size / 1e9:.1f} GB)")


def _damaged_step(folder: Path, step: int, damage: str) -> UserError:
    return UserError(
        f"checkpoint {folder / str(step)} cannot be used: {damage}. "
        f"Copy it back from a backup, use another step, or move {folder} away to start afresh"
    )


def _present(folder: Path) -> list[int]:
    """Steps of which anything is there, ascending."""
    if not folder.is_dir():
        return []
    names = {path.name.removesuffix(manifest.SUFFIX) for path in folder.iterdir()}
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name))


def completed_steps(folder: Path) -> list[int]:
    """Steps whose save in `folder` was completed, ascending; their files are not read."""
    paths = {step: folder / str(step) for step in _present(folder)}
    return [step for step, path in paths.items() if path.is_dir() and manifest.manifest_path(path).is_file()]


def _remove_step(folder: Path, step: int) -> None:
    # The manifest goes first: half a step must not look like a damaged one.
    manifest.manifest_path(folder / str(step)).unlink(missing_ok=True)
    if (folder / str(step)).is_dir():
        shutil.rmtree(folder / str(step))


def _remove_leftovers(folder: Path) -> None:
    for path in folder.iterdir():
        if ".orbax-checkpoint-tmp" in path.name and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name.endswith(manifest.SUFFIX + ".tmp"):
            path.unlink()


def _raise_explained(error: Exception, folder: Path) -> NoReturn:
    """Raises the user's error where the disk is at fault, else `error`. Tensorstore has the number in its text only."""
    stated = re.search(r"os_error_code='(\d+)'", str(error))
    code = int(stated.group(1)) if stated else error.errno if isinstance(error, OSError) else None
    if code in _FULL:
        raise UserError(
            f"cannot save to {folder}: the disk (or a quota, or the file size limit) is full. The checkpoints saved "
            "before are intact. Free space, or lower checkpointing.keep, then start the same command again to resume"
        ) from error
    if code in _REFUSED:
        raise UserError(
            f"cannot save to {folder}: {error}. Make it writable, or choose another run directory"
        ) from error
    raise error


def _silence_orbax() -> None:
    """Orbax logs tracebacks of errors that it raises as well; a user is to see each once, in our words."""
    logger = logging.getLogger("absl")
    if _not_from_orbax not in logger.filters:
        logger.addFilter(_not_from_orbax)
        logging.getLogger("asyncio").addFilter(_not_of_a_write)
        sys.unraisablehook = functools.partial(_unless_loop_closed, sys.unraisablehook)


def _unless_loop_closed(report: Callable[[Any], object], unraisable: Any) -> None:
    """When one file of a save meets a full disk, orbax ends the loop that its other writes still report to."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        report(unraisable)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


def _not_of_a_write(record: logging.LogRecord) -> bool:
    """Of several writes that a full disk stops, orbax raises the first; asyncio tells of the others later."""
    error = record.exc_info[1] if record.exc_info else None
    return "never retrieved" not in record.getMessage() or "os_error_code=" not in str(error)
