"""The digests of a checkpoint, made and checked by all processes of a run together, each reading its part of the files.

What they tell each other goes over `processes`, where nothing gives up after a fixed time: the digests of a large
checkpoint may take an hour on a slow disk.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

from meshgpt.checkpoint import manifest
from meshgpt.distributed import processes
from meshgpt.errors import MachineError


def write_manifest(
    folder: Path, name: str, *, then: Callable[[], None] = lambda: None, progress: Callable[[], None] = lambda: None
) -> None:
    """`manifest.write_manifest` by all processes; it returns on all of them when the manifest is there and `then` done.

    Args:
        folder: as all processes see it.
        name: the same on all processes, and of no other call.
        then: what process 0 does after the manifest.
        progress: called every few seconds while this process reads, or waits for others, whose own signs of life tell
            whether they read.

    Raises:
        MachineError: on the others, when process 0 could not write it. Process 0 raises what `manifest` and `then` do.
    """
    if not processes.several():
        manifest.write_manifest(folder, progress=progress)
        then()
    elif processes.number() == 0:
        try:
            manifest.write_manifest(folder, _gathered(folder, name, progress), progress)
            then()
        except Exception as error:
            processes.publish(f"{name}/done", str(error) or repr(error))
            raise
        processes.publish(f"{name}/done", "")
    else:
        sizes = json.loads(processes.awaited(f"{name}/sizes", progress))
        try:
            own = manifest.share(sizes, (processes.number(), processes.count()))
            found = manifest.digest_files(folder, own, progress)
        except (OSError, manifest.DamagedError):  # as when this host is late to see the files: process 0 reads them
            found = {}
        processes.publish(f"{name}/{processes.number()}", json.dumps(found))
        if failure := processes.awaited(f"{name}/done", progress):
            raise MachineError(f"process 0 could not complete the checkpoint {folder}: {failure}")


def _gathered(folder: Path, name: str, progress: Callable[[], None]) -> manifest.Files:
    """On process 0, the digests by all processes of their parts."""
    sizes: dict[str, int] = {}
    try:
        sizes = manifest.list_files(folder)
    finally:  # the others wait for it even where it failed, and then hear why
        processes.publish(f"{name}/sizes", json.dumps(sizes))
    found = manifest.digest_files(folder, manifest.share(sizes, (0, processes.count())), progress)
    for number in range(1, processes.count()):
        found |= json.loads(processes.awaited(f"{name}/{number}", progress))
        processes.forget(f"{name}/{number}")
    processes.forget(f"{name}/sizes")
    return found


def led(
    folder: Path, work: Callable[[Callable[[Path], None]], int], progress: Callable[[], None] = lambda: None
) -> int:
    """What `work(verify)` gives on process 0, on all of them.

    `verify` is `manifest.verify` of a folder in `folder`, by all processes; it raises on process 0 alone.
    `progress` is as `write_manifest` has it.
    """
    if not processes.several():
        return work(lambda step_folder: manifest.verify(step_folder, progress=progress))
    name, tasks = f"meshgpt/verified/{processes.turn()}", itertools.count()
    if processes.number():
        return _helped(folder, name, progress)

    def verify(step_folder: Path) -> None:
        task = f"{name}/{next(tasks)}"
        processes.publish(task, step_folder.name)
        manifest.verify(step_folder, (0, processes.count()), progress)
        for number in range(1, processes.count()):
            if processes.awaited(f"{task}/{number}", progress):  # that host may only be late to see the files
                manifest.verify(step_folder, (number, processes.count()), progress)

    result = work(verify)
    processes.publish(f"{name}/{next(tasks)}", f"={result}")
    return result


def _helped(folder: Path, name: str, progress: Callable[[], None]) -> int:
    """Reads this process's part of each folder that process 0 names, until it tells the result."""
    for task in itertools.count():
        said = processes.awaited(f"{name}/{task}", progress)
        if said.startswith("="):
            return int(said[1:])
        try:
            manifest.verify(folder / said, (processes.number(), processes.count()), progress)
            damage = ""
        except (OSError, manifest.DamagedError) as error:
            damage = str(error)
        processes.publish(f"{name}/{task}/{processes.number()}", damage)
    raise AssertionError("unreachable")
