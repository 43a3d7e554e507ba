"""Several processes as one run: they find each other, agree on what they run, and end together.

Cloud TPU, SLURM, GKE and Open MPI are found by JAX's own cluster detection. Anything else says it by flags or by the
environment, `--coordinator` or MESHGPT_COORDINATOR and so on (`ProcessSpec`). One process needs none of this.

What has to be said before devices are there, or may take hours, goes over the coordinator's key-value store and not by
a collective, whose partners would give up.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

import meshgpt
from meshgpt.distributed import stopping
from meshgpt.errors import MachineError, PortTakenError, UserError, flush_output
from meshgpt.settings import settings

T = TypeVar("T")

FLAGS = {
    "coordinator": "Address of process 0 as HOST:PORT, as the others reach it.",
    "bind": "Address that process 0 listens on; none given takes the coordinator's own.",
    "processes": "Number of processes.",
    "process_id": "Number of this process, counted from 0.",
    "deadline": "Seconds within which all processes must have come; none given takes 300.",
}
HELP = "\n".join(
    [
        "Processes of one run that no cluster starts find each other by these flags or MESHGPT_COORDINATOR and so on:",
        *(f"--{name.replace('_', '-')}: {text}" for name, text in FLAGS.items()),
    ]
)
_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy")
_HEARTBEAT_SECONDS = 60  # a host that says nothing for so long is taken for dead
_SHARED_SECONDS = 60.0  # a network file system may show a new file that late
_PIECE = 2000  # milliseconds of a wait for another process, which is repeated for as long as it takes
turn = itertools.count().__next__  # every process takes the same turns in the same order, so their numbers agree


@settings()
class ProcessSpec:
    """Which of the processes of a run this one is.

    coordinator: HOST:PORT of process 0, as the others reach it. bind: the address that process 0 listens on, that of
    `coordinator` by default; never all interfaces unless it is said (0.0.0.0). processes, process_id: how many, and the
    number of this one. deadline: seconds within which all must have come.
    """

    coordinator: str
    bind: str
    processes: int
    process_id: int
    deadline: float


def take_flags(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The flags of this module taken out of a command's arguments: ({name: value}, the rest)."""
    found: dict[str, str] = {}
    rest = list(arguments)
    for name in FLAGS:
        flag = f"--{name.replace('_', '-')}"
        for index, argument in enumerate(rest):
            given, equals, value = argument.partition("=")
            if given == flag or (name == "deadline" and given == "--deadline-seconds"):  # as `launch` once called it
                if not equals and index + 1 == len(rest):
                    raise UserError(f"{flag} needs a value")
                found[name] = value if equals else rest[index + 1]
                del rest[index : index + (1 if equals else 2)]
                break
    return found, rest


def process_spec(flags: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> ProcessSpec | None:
    """Where this process stands, by flags, environment or JAX's cluster detection; None for a run of one process.

    Raises:
      UserError: settings that are incomplete or contradict each other.
    """
    said = {name: environment.get(f"MESHGPT_{name.upper()}", "") for name in FLAGS} | dict(flags)
    deadline = _number("deadline", said["deadline"] or "300", float)
    if said["coordinator"]:
        missing = [name for name in ("processes", "process_id") if not said[name]]
        if missing:
            raise UserError(
                f"--coordinator {said['coordinator']} needs --{missing[0].replace('_', '-')} too "
                f"(or MESHGPT_{missing[0].upper()})"
            )
        count, number = (_number(name, said[name], int) for name in ("processes", "process_id"))
        coordinator = said["coordinator"]
    else:
        extra = [name for name in ("bind", "processes", "process_id") if said[name]]
        if extra:
            raise UserError(f"--{extra[0].replace('_', '-')} {said[extra[0]]}: --coordinator HOST:PORT is missing")
        detected = _detect(deadline)
        if detected is None:
            return None
        coordinator, count, number = detected
    if not 0 <= number < count:
        raise UserError(f"--process-id {number}: with --processes {count} it is one of 0 to {count - 1}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator {coordinator!r}: give HOST:PORT of process 0, for example 10.0.0.1:8476")
    bind = said["bind"] or host
    bind = bind if bind.rpartition(":")[2].isdigit() and bind.count(":") == 1 else f"{bind}:{port}"
    return ProcessSpec(coordinator=coordinator, bind=bind, processes=count, process_id=number, deadline=deadline)


def _number(name: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = -1
    if not 0 <= value < float("inf"):
        raise UserError(f"--{name.replace('_', '-')} {text!r} is not a number of 0 or more")
    return value


def _detect(deadline: float) -> tuple[str, int, int] | None:
    """Coordinator, number of processes and this one's, from JAX's cluster detection; None where there is no cluster."""
    from jax._src.clusters import ClusterEnv  # what `jax.distributed.initialize` asks, which joins whatever the count

    coordinator, count, number, _ = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, int(deadline)
    )
    return (
        None if coordinator is None or count is None or number is None or count == 1 else (coordinator, count, number)
    )


@contextlib.contextmanager
def distributed_session(spec: ProcessSpec | None, say: Callable[[str], None]) -> Iterator[None]:
    """Within it this process is one of those of `spec`, or alone for None, and stops as `stopping` says.

    It is left when all processes have come to its end: JAX's own wait, at the end of a process, gives up after five
    minutes. An exception that nothing explains ends the process at once, with code 1: JAX would wait for the others,
    which wait for this one.

    Raises:
      UserError: the port is in use (PortTakenError with MESHGPT_ANY_PORT), or the address is not this machine's.
      KeyboardInterrupt: a stop was asked for before anything was done that has to be saved.
    """
    with stopping.listening():
        try:
            with contextlib.nullcontext() if spec is None else _session(spec, say):
                yield
        except KeyboardInterrupt:
            if (text := stopping.saved_text()) is None:
                raise
            if text:
                say(text)


@contextlib.contextmanager
def _session(spec: ProcessSpec, say: Callable[[str], None]) -> Iterator[None]:
    if spec.process_id == 0:
        _check_address(spec)
        say(f"waiting for {spec.processes - 1} more processes at {spec.coordinator} (at most {spec.deadline:g} s)")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from `stopping`
    with _watched(spec):
        jax.distributed.initialize(
            spec.coordinator,
            spec.processes,
            spec.process_id,
            coordinator_bind_address=spec.bind,
            cluster_detection_method=None if _gives_devices() else "deactivate",
            initialization_timeout=int(spec.deadline) + 3600,  # `_watched` ends it in words; JAX by an abort
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    stopping.join(_store(), spec.process_id, spec.processes)
    try:
        yield
        meet()
    except (UserError, MachineError, KeyboardInterrupt):
        raise
    except Exception:  # whatever it is, the others would wait for this process
        with contextlib.suppress(OSError):
            traceback.print_exc()
        leave(1)


def leave(code: int) -> int:
    """`code`, for a process that goes alone or with all others; ends one that others may wait for at once."""
    if not several() or (code == 0 and not stopping.leaving()):
        return code
    flush_output()
    if stopping.leaving():
        stopping.say_farewell()
    os._exit(code)


def several() -> bool:
    """Whether this process is one of several (without starting the devices)."""
    return jax.distributed.is_initialized()


def _gives_devices() -> bool:
    """Whether the launcher gives each process a device of its own (JAX reads which one from its variables)."""
    return any(name in os.environ for name in ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK"))


def _check_address(spec: ProcessSpec) -> None:
    host, _, port = spec.bind.rpartition(":")
    named = spec.coordinator.rpartition(":")[0]
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        later = error.errno == socket.EAI_AGAIN  # the name server did not answer
        raise (MachineError if later else UserError)(
            f"{host} is not known here ({error.strerror}): give --bind ADDRESS of this machine"
        ) from error
    except OSError as error:
        replaceable = error.errno == errno.EADDRINUSE and "MESHGPT_ANY_PORT" in os.environ
        raise (PortTakenError if replaceable else UserError)(
            f"cannot listen on {spec.bind}: {error.strerror}. A port in use needs another one in --coordinator "
            "(on every process); an address that is not this machine's, --bind"
        ) from error
    if str(address[0]).startswith("127.") and not (named == "localhost" or named.startswith("127.")):
        raise UserError(
            f"{host} is {address[0]} on this machine, where no other machine can reach it (see /etc/hosts): "
            "give --bind ADDRESS, or MESHGPT_BIND"
        )


@contextlib.contextmanager
def _watched(spec: ProcessSpec) -> Iterator[None]:
    """Ends the process with a message when the deadline passes within."""
    done = threading.Event()

    def watch() -> None:
        if done.wait(spec.deadline):
            return
        late = f"error: after {spec.deadline:g} s "
        if spec.process_id and not _answers(spec.coordinator):
            text = f"nobody answers at {spec.coordinator}: is process 0 running, and is that its address? A firewall?"
        else:
            text = (
                f"not all {spec.processes} processes have come to {spec.coordinator}: look at the output of the "
                "others, and whether each has its own --process-id"
            )
        print(late + text + " --deadline SECONDS waits longer.", file=sys.stderr, flush=True)
        os._exit(3 if "MESHGPT_LAUNCH" in os.environ else 2)  # a supervisor tries again: the others may be restarting

    threading.Thread(target=watch, daemon=True, name="deadline").start()
    try:
        yield
    finally:
        done.set()


def _answers(coordinator: str) -> bool:
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def primary_first(first: Callable[[], T], others: Callable[[], T]) -> T:
    """`first()` on process 0, and when it has returned `others()` on the others.

    Raises:
      UserError: that of process 0, on all of them.
    """
    if not several():
        return first()
    key = f"meshgpt/turn/{turn()}"
    if number():
        _accept(awaited(key), "process 0 cannot go on: ")
        return others()
    try:
        result = first()
    except (UserError, MachineError) as error:
        _refuse(key, error)
        raise
    publish(key, "")
    return result


def _refuse(key: str, error: UserError | MachineError) -> None:
    publish(key, f"{type(error).__name__}: {error}")
    time.sleep(2)  # the store ends with this process, and the others have to hear it first


def _accept(said: str, before: str = "") -> None:
    """Raises what `_refuse` was given elsewhere, if anything."""
    kind, _, message = said.partition(": ")
    if kind:
        raise (UserError if kind == UserError.__name__ else MachineError)(f"{before}{message}")


def meet() -> None:
    """Returns when all processes have come here, however long one takes."""
    if several():
        _settle("meeting", "")


def publish(key: str, text: str) -> None:
    """Lets every process hear `text` under a new key, and so of one that the run has not used."""
    _store().key_value_set(key, text)


def awaited(key: str, waiting: Callable[[], None] = lambda: None) -> str:
    """What a process published under `key`, whenever it does.

    It is asked for again and again: signals are heard meanwhile, and `waiting` is called. If the other process ends
    without it, JAX ends this one.
    """
    while True:
        try:
            return _store().blocking_key_value_get(key, _PIECE)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        waiting()


def forget(key: str) -> None:
    """Removes what was published under `key`, once all who await it have heard it."""
    _store().key_value_delete(key)


def gather_text(name: str, text: str, seconds: float = 1.0) -> dict[int, str]:
    """On process 0, what each process says under a new name, but for those later than `seconds`; {} elsewhere."""
    key, store = f"meshgpt/gathered/{name}/", _store()
    store.key_value_set(f"{key}{number()}", text)
    if number():
        return {}
    until = time.monotonic() + seconds
    while len(found := store.key_value_dir_get(key)) < count() and time.monotonic() < until:
        time.sleep(0.002)
    store.key_value_delete(key)
    return {int(path.rpartition("/")[2]): said for path, said in found}


def check_shared(file: Path) -> None:
    """Raises UserError on all processes where one of them does not see `file` as process 0 wrote it."""
    if not several():
        return
    wanted = _published("shared", lambda: _digest(file))
    until, seen = time.monotonic() + _SHARED_SECONDS, _digest(file)
    while seen != wanted and time.monotonic() < until:
        time.sleep(1)
        seen = _digest(file)
    _settle(
        "folder",
        "" if seen == wanted else f"does not see {file} as process 0 wrote it: give a --run-dir that all hosts share",
    )


def check_agreement(configuration: Any, compare: Callable[[Any, Any], list[tuple[str, Any, Any]]]) -> None:
    """Whether all processes run the same code and packages with the same configuration (JSON).

    Args:
      compare: (name, old, new) of everything in which two configurations differ.

    Raises:
      UserError: on all of them, naming a process, its host, and what differs.
    """
    if not several():
        return
    mine = {"configuration": configuration, "code": _code_digest(), "packages": _versions()}
    theirs = json.loads(_published("facts", lambda: json.dumps(mine)))
    differing = [
        f"{name} {old!r} there, {new!r} here" for name, old, new in compare(theirs["packages"], mine["packages"])
    ]
    if theirs["code"] != mine["code"]:
        differing.append(f"the code of meshgpt (digest {theirs['code'][:12]} there, {mine['code'][:12]} here)")
    settings = compare(theirs["configuration"], mine["configuration"])
    differing += [f"{name} {old!r} there, {new!r} here" for name, old, new in settings]
    _settle("agreement", f"differs from process 0: {'; '.join(differing[:5])}" if differing else "")


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _code_digest() -> str:
    package = Path(meshgpt.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return "none"


def _published(name: str, value: Callable[[], str]) -> str:
    """What process 0 says."""
    key = f"meshgpt/{name}/{turn()}"
    if number() == 0:
        text = value()
        publish(key, text)
        return text
    return awaited(key)


def _settle(name: str, complaint: str) -> None:
    """Raises UserError on every process if one of them complains."""
    key, own = f"meshgpt/{name}/{turn()}", number()
    complaint = complaint and f"process {own} on {socket.gethostname()} {complaint}"
    publish(f"{key}/{own}", complaint)
    verdict = f"{key}/verdict"
    if own == 0:
        said = [awaited(f"{key}/{other}") for other in range(count())]
        said = [text for text in said if text]
        if said:
            more = f" (and {len(said) - 1} more processes)" if len(said) > 1 else ""
            error = UserError(said[0] + more)
            _refuse(verdict, error)
            raise error
        publish(verdict, "")
    else:
        _accept(awaited(verdict))


def _state() -> Any:
    from jax._src import distributed  # the only way to its key-value store; orbax and multihost_utils take it too

    return distributed.global_state


def _store() -> Any:
    return _state().client


def count() -> int:
    """How many processes there are."""
    return _state().num_processes


def number() -> int:
    """This process's number, without starting the devices as `jax.process_index` does."""
    return _state().process_id
