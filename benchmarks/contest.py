"""Training steps of one shape, taken in turns by processes that start from the same weights and see the same tokens.

`compare.py` is its command. A contestant that does not start, runs out of memory or time, or whose losses are others,
is left out with the reason, and the rest go on.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
TOKENS = 50257  # ids that a tokenizer gives, whatever a vocabulary is padded to
TOLERANCE = {"float32": 2e-4, "bfloat16": 5e-3, "float16": 5e-3}  # a step lowers the loss by more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and a batch, and how ours runs its layers (see meshgpt.models.layers.Execution).

    platform: JAX's name of what ours runs on, which the others have to run on too.
    checkpointing: peers of PyTorch recompute each block's activations. plain: biases start at zero, as peers without
    biases need it; else at noise, so that one that is mistaken for another shows in the losses.
    """

    name: str
    family: str
    layers: int
    width: int
    heads: int
    vocab: int
    rows: int
    length: int
    dtype: str
    platform: str
    unroll: int
    remat: str
    checkpointing: bool
    plain: bool


@dataclasses.dataclass(frozen=True)
class Entry:
    """Who takes part. losses: how many of the first losses have to be the others'."""

    name: str
    script: str
    words: tuple[str, ...]
    python: str
    losses: int = 3

    def command(self, folder: Path) -> list[str]:
        return [self.python, str(HERE / "contestants" / self.script), str(folder), *self.words]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turns:
    """rounds: steps that count, of each. passes: 0 keeps all of them side by side and takes turns by steps; else each
    has the device to itself and turns are whole processes, so many of each. patience: seconds until ready."""

    rounds: int
    passes: int
    patience: float


class Failed(Exception):
    """A contestant cannot go on; why is the message."""


class Contestant:
    """A process that trains a step when told."""

    def __init__(self, entry: Entry, folder: Path, patience: float, together: bool) -> None:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (a pipe that nobody reads fills)
        environment = os.environ | {"PYTHONPATH": str(HERE.parent), "TOKENIZERS_PARALLELISM": "false"}
        if together:
            environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        else:
            environment |= {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
        self._process = subprocess.Popen(
            entry.command(folder), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env=environment,
        )  # fmt: skip
        alarm = threading.Timer(patience, self._process.kill)
        alarm.start()
        begun = time.monotonic()
        try:
            self.ready = self._hear()
        except Failed:
            late = time.monotonic() - begun >= patience
            why = f"not ready within {patience:.0f} s" if late else self._why()
            self.end()
            raise Failed(why) from None
        finally:
            alarm.cancel()

    def step(self) -> float:
        return self._ask("step")["seconds"]

    def peak_bytes(self) -> int:
        """The most memory it held; its last word."""
        peak = self._ask("end")["peak_bytes"]
        self._process.wait()
        return peak

    def end(self) -> None:
        self._process.kill()
        with contextlib.suppress(BrokenPipeError), self._process, self._errors:
            pass  # closes what leads to it

    def _ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{what}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Failed(self._why()) from None
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise Failed(self._why())

    def _why(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        telling = [line for line in lines if "Error:" in line or "Exception:" in line or "RESOURCE_EXHAUSTED" in line]
        return (telling or lines or [f"it ended with {code} without a word"])[-1][:300]


@dataclasses.dataclass
class Result:
    """Of one contestant, over its processes."""

    seconds: list[float]
    peak_bytes: int
    seconds_to_first_step: float
    losses: list[float]
    versions: dict[str, str]

    def spread(self) -> tuple[float, float, float]:
        """Lower quartile, median, upper quartile of a step, in seconds."""
        low, median, high = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else self.seconds * 3
        return low, median, high


class Contest:
    """Results by name, and who is out and why."""

    def __init__(self, folder: Path, entries: list[Entry], turns: Turns, dtype: str) -> None:
        self.results: dict[str, Result] = {}
        self.out: dict[str, str] = {}
        self._folder, self._turns, self._tolerance = folder, turns, TOLERANCE[dtype]
        self._entries = entries

    def run(self) -> None:
        passes = self._turns.passes
        for turn in range(passes):
            entries = self._entries[turn % len(self._entries) :] + self._entries[: turn % len(self._entries)]
            for entry in entries:
                self._steps([entry], -(-self._turns.rounds // passes), together=False)
        if not passes:
            self._steps(self._entries, self._turns.rounds, together=True)
        for name in self.out:
            self.results.pop(name, None)

    def _steps(self, entries: list[Entry], rounds: int, together: bool) -> None:
        """So many steps of each, in turns; each round starts with another one, and the first does not count."""
        running: dict[str, Contestant] = {}
        try:
            for entry in entries:  # one after the other: they would slow each other's compilation
                if entry.name not in self.out:
                    self._start(entry, running, together)
            for turn in range(-1, rounds):
                begun = time.monotonic()
                names = list(running)
                for name in names[turn % len(names) :] + names[: turn % len(names)] if names else []:
                    self._step(name, running, counts=turn >= 0)
                if turn == 0 and running:
                    seconds = time.monotonic() - begun
                    print(f"  {rounds} rounds of {', '.join(running)}: about {rounds * seconds:.0f} s", flush=True)
            for name, contestant in list(running.items()):
                try:
                    result = self.results[name]
                    result.peak_bytes = max(result.peak_bytes, contestant.peak_bytes())
                except Failed as why:
                    self._drop(name, str(why), running)
        finally:
            for contestant in running.values():
                contestant.end()

    def _start(self, entry: Entry, running: dict[str, Contestant], together: bool) -> None:
        try:
            contestant = Contestant(entry, self._folder, self._turns.patience, together)
        except Failed as why:
            self._drop(entry.name, str(why), running)
            return
        ready = contestant.ready
        running[entry.name] = contestant
        if entry.name not in self.results:
            print(f"  {entry.name}: first losses {ready['losses']}", flush=True)
            result = Result([], 0, ready["seconds_to_first_step"], ready["losses"], ready["versions"])
            first = next(iter(self.results.values()), result).losses[: entry.losses]
            if not np.allclose(ready["losses"][: entry.losses], first, rtol=self._tolerance, atol=0):
                self._drop(entry.name, f"its losses differ: {ready['losses']}, not {first}", running)
            else:
                self.results[entry.name] = result

    def _step(self, name: str, running: dict[str, Contestant], counts: bool) -> None:
        try:
            seconds = running[name].step()
        except Failed as why:
            self._drop(name, str(why), running)
            return
        if counts:
            self.results[name].seconds.append(seconds)

    def _drop(self, name: str, why: str, running: dict[str, Contestant]) -> None:
        print(f"  {name} is out: {why}", flush=True)
        self.out[name] = why
        if name in running:
            running.pop(name).end()


def write_task(folder: Path, shape: Shape) -> None:
    """What every contestant reads: the model, the tokens, and spec.json (see contestants/protocol.py)."""
    _write_model(folder, shape)
    rows = np.random.default_rng(1).integers(0, min(shape.vocab, TOKENS), (shape.rows, shape.length + 1))
    np.save(folder / "tokens.npy", rows)
    training = {"learning_rate": 3e-4, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0}
    cores = {"cores": len(os.sched_getaffinity(0))}
    (folder / "spec.json").write_text(json.dumps(dataclasses.asdict(shape) | training | cores))


def _write_model(folder: Path, shape: Shape) -> None:
    """A Hugging Face folder of the shape with random weights, one tensor at a time."""
    from meshgpt import convert
    from meshgpt.convert import safetensor
    from meshgpt.convert.hf_names import stored_tensors

    positions = max(2048 if shape.family == "gptj" else 1024, shape.length)
    config = {"model_type": shape.family, "n_layer": shape.layers, "n_head": shape.heads, "n_embd": shape.width}
    config |= {"n_positions": positions, "vocab_size": shape.vocab}
    config |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    config |= {"rotary_dim": min(64, shape.width // shape.heads)} if shape.family == "gptj" else {}
    name = {"gpt2": "GPT2LMHeadModel", "gptj": "GPTJForCausalLM"}[shape.family]
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [name], "torch_dtype": "float32"}))
    tensors, rng = stored_tensors(convert.read_config(folder)), np.random.default_rng(0)
    shapes = [(tensor.name, tensor.shape) for tensor in tensors]
    with safetensor.Writer(folder / "model.safetensors", shapes, np.dtype(np.float32)) as writer:
        for tensor in tensors:
            is_norm = ".ln_" in tensor.name and tensor.name.endswith("weight")
            scale = 0.0 if shape.plain and tensor.name.endswith("bias") else 0.02
            noise = rng.standard_normal(tensor.shape, np.float32) * np.float32(scale)
            writer.add(tensor.name, noise + np.float32(is_norm))
