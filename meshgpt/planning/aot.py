"""A run's train step compiled for a pod that is not there: does it fit, what does it send, how long does it take.

JAX compiles for a description of devices; libtpu (the extra `tpu`) holds the TPU's compiler, JAX's CUDA plugin (the
extra `cuda12` or `cuda13`) the GPU's. Nothing runs: memory is the compiler's own account, time an estimate.
"""

import dataclasses
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import jax
from jax.experimental import topologies as jax_topologies

from meshgpt import runtime
from meshgpt.config import Run
from meshgpt.distributed.mesh import MeshShape, make_mesh
from meshgpt.errors import UserError
from meshgpt.hardware.topologies import GENERATIONS, GPUS, Gpu, Topology
from meshgpt.models import flops
from meshgpt.models.model import check_divisibility
from meshgpt.planning import hlo
from meshgpt.training.memory import Footprint, NoRoomError, compile_lowered, measure
from meshgpt.training.program import Program, training_flops

# What the estimate of time assumes.
EFFICIENCY = 0.6  # of the peak, in matrix multiplications and all that goes with them
# Of a forward pass, in the backward pass.
RECOMPUTED = {"none": 0.0, "dots": 0.0, "named": 0.1, "offload": 0.1, "full": 1.0}

# XLA's description of a GPU: its stream_executor.GpuTargetConfigProto, as text.
_GPU_TARGET = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: {shared} threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: {units}
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {traffic}
l2_cache_size: {cache} clock_rate_ghz: {clock} device_memory_size: {memory} shared_memory_per_block_optin: {most}
cuda_compute_capability {{ major: {major} minor: {minor} }} registers_per_core_limit: 65536
registers_per_block_limit: 65536 }} platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }} device_description_str: "{kind}" """
# By compute capability, of a multiprocessor: bytes of shared memory, threads, units for float32 (CUDA programming
# guide, technical specifications). A block may have all of the shared memory but 1 KiB.
_MULTIPROCESSORS = {
    (8, 0): (164 << 10, 2048, 64),
    (8, 6): (100 << 10, 1536, 128),
    (8, 9): (100 << 10, 1536, 128),
    (9, 0): (228 << 10, 2048, 128),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of a step: computing, and moving bytes by mesh axis; at best at once, at worst one after the other."""

    computing: float
    moving: dict[str, float]

    @property
    def best(self) -> float:
        return max(self.computing, *self.moving.values(), 0.0) if self.moving else self.computing

    @property
    def worst(self) -> float:
        return self.computing + sum(self.moving.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proof:
    """What compiling one run for one topology has shown."""

    run: Run
    topology: Topology
    mesh: MeshShape
    memory: Footprint
    collectives: tuple[hlo.Collective, ...]
    kernel: str
    flops_per_token: int
    estimate: Estimate

    @property
    def tokens_per_step(self) -> int:
        return self.run.global_batch * self.run.sequence_length

    def mfu(self, seconds: float) -> float:
        """Of the model's FLOPs, were a step to take `seconds`."""
        return (
            self.flops_per_token * self.tokens_per_step / seconds / (self.topology.device_count * peak(self.topology))
        )


class TooLargeError(UserError):
    """The compiler found no room. needed: bytes of a device, where the compiler named them."""

    def __init__(self, message: str, needed: float | None = None) -> None:
        super().__init__(message)
        self.needed = needed


class Compiled(NamedTuple):
    """A train step compiled for devices that are elsewhere. program: its run has what the devices decide filled in."""

    program: Program
    mesh: jax.sharding.Mesh
    step: jax.stages.Compiled
    memory: Footprint


def quiet_compiler() -> None:
    """What libtpu must be told before it is loaded: that there is no TPU here, and to keep its log to itself."""
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # 1 is JAX's own; the compiler's advice is not a user's
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    runtime.quiet_libtpu()
    jax.config.update("jax_platforms", "cpu")


def set_effort(low: bool) -> None:
    """Tells the compiler to hurry, or to take its time, which is the default."""
    if hasattr(jax.config, "jax_exec_time_optimization_effort"):  # JAX 0.12 has levels alone
        jax.config.update("jax_exec_time_optimization_effort", -1.0 if low else 0.0)
    else:
        jax.config.update("jax_optimization_level", "O1" if low else "UNKNOWN")


def devices_of(topology: Topology) -> Sequence[jax.Device]:
    """Devices to compile for; they cannot run anything.

    Raises:
      UserError: the compiler for them is not installed.
    """
    try:
        if not topology.is_tpu:
            shape, target = f"1x1x{topology.chip_count}", _gpu_target(GPUS[topology.generation])
            return jax_topologies.get_topology_desc("", "cuda", target_config=target, topology=shape).devices
        kind = GENERATIONS[topology.generation]
        name = f"{topology.generation}:{'x'.join(map(str, topology.chips))}"
        several = {"num_slices": topology.slices} if topology.slices > 1 else {}
        three = (*topology.wrap, False)[:3]  # a slice of two axes has a third of length 1
        wrap = {"wrap": three} if any(three) else {}
        alone = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(topology.chips) == 1 else {}
        options = {**wrap, **several, **alone, **dict(kind.options)}
        return jax_topologies.get_topology_desc(name, "tpu", **options).devices
    except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        extra = "tpu" if topology.is_tpu else "cuda12"
        said = (str(error) or repr(error)).splitlines()[0][:200]
        raise UserError(
            f"--topology {topology.name}: the compiler for it cannot be loaded ({said}). "
            f"It comes with the extra: pip install 'meshgpt[{extra}]'"
        ) from error


def _gpu_target(gpu: Gpu) -> str:
    shared, threads, units = _MULTIPROCESSORS[gpu.capability]
    major, minor = gpu.capability
    text = _GPU_TARGET.format(
        shared=shared, most=shared - 1024, threads=threads, units=units, major=major, minor=minor,
        **dataclasses.asdict(gpu),
    )  # fmt: skip
    return text.replace("\n", " ")


@contextmanager
def _capability_of(topology: Topology) -> Iterator[None]:
    """Lets cuDNN's attention be judged by the GPUs that are compiled for: JAX 0.10 asks those of this machine."""
    if topology.is_tpu:
        yield
        return
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    real, theirs = cudnn.check_compute_capability, GPUS[topology.generation].capability
    cudnn.check_compute_capability = lambda asked: theirs >= tuple(map(int, asked.split(".")))
    try:
        yield
    finally:
        cudnn.check_compute_capability = real


def peak(topology: Topology) -> float:
    """FLOP/s of one device in 16 bits."""
    kind = f"TPU {topology.generation}" if topology.is_tpu else GPUS[topology.generation].kind
    found = flops.peak_flops(kind)
    assert found is not None
    return found


def compile_for(run: Run, topology: Topology, *, hbm: int | None = None) -> Compiled:
    """Compiles the train step of `run` for `topology`.

    Args:
      hbm: bytes of a device, instead of what the topology's has: a smaller one simulated.

    Raises:
      TooLargeError: the TPU's compiler found no room (the GPU's compiles all the same: look at the memory).
      UserError: the mesh does not match the devices, or the model the mesh.
    """
    devices = devices_of(topology)
    shape = run.mesh.resolve(len(devices))
    check_divisibility(run.model, shape, run.global_batch, run.accumulate)
    run = dataclasses.replace(run, precision=run.precision.resolve("tpu" if topology.is_tpu else "gpu"), mesh=shape)
    limit = min(topology.memory, hbm or topology.memory)
    mesh = make_mesh(shape, devices)
    with jax.set_mesh(mesh), _capability_of(topology):
        program = Program(run=run, document_end=0 if run.data.mask_documents else None)
        try:
            compiled = compile_lowered(program.lower(), _options(hbm if topology.is_tpu else None))
        except NoRoomError as error:
            needed = _needed(str(error))
            raise TooLargeError(_too_large(topology, needed, limit), needed) from error
        return Compiled(program, mesh, compiled, measure(program, compiled, limit))


def prove(run: Run, topology: Topology, *, hbm: int | None = None) -> Proof:
    """Compiles the train step of `run` for `topology`; arguments as in `compile_for`.

    Raises:
      TooLargeError: it does not fit, by how much.
      UserError: the mesh does not match the devices, or the model the mesh.
    """
    program, mesh, compiled, memory = compile_for(run, topology, hbm=hbm)
    run = program.run
    text = compiled.as_text() or ""
    found = tuple(hlo.collectives(text, {axis: getattr(run.mesh, axis) for axis in mesh.axis_names}))
    proof = Proof(
        run=run, topology=topology, mesh=run.mesh, memory=memory, collectives=found, kernel=_kernel(text),
        flops_per_token=training_flops(run).total, estimate=_estimate(run, topology, found),
    )  # fmt: skip
    if not topology.is_tpu and memory.limit is not None and memory.peak > memory.limit:
        raise TooLargeError(_too_large(topology, memory.peak, memory.limit), memory.peak)
    return proof


def _options(hbm: int | None) -> dict[str, str | bool] | None:
    return None if hbm is None else {"xla_tpu_max_hbm_size_mib": str(hbm >> 20)}


def _kernel(text: str) -> str:
    targets = hlo.kernels(text)
    if any("tpu_custom_call" in target for target in targets):
        return "splash"
    return "cudnn" if any("fmha" in target for target in targets) else "xla"


def _estimate(run: Run, topology: Topology, found: Sequence[hlo.Collective]) -> Estimate:
    counted = training_flops(run)
    again = RECOMPUTED[run.execution.remat] * counted.forward  # of what is trained; a teacher has no backward pass
    done = (counted.total + again) * run.global_batch * run.sequence_length
    seconds: dict[str, float] = defaultdict(float)
    for one in found:
        across = topology.slices > 1 and "data" in one.axes
        seconds[one.axes] += one.moved * one.times / bandwidth(topology, across)
    return Estimate(computing=done / (topology.device_count * peak(topology) * EFFICIENCY), moving=dict(seconds))


def bandwidth(topology: Topology, across: bool) -> float:
    """Bytes a second that a device receives in a collective along one axis: both ways round a ring, one way without."""
    if not topology.is_tpu:
        return GPUS[topology.generation].link
    kind = GENERATIONS[topology.generation]
    return kind.network if across else kind.link * (2 if any(topology.wrap) else 1)


def _too_large(topology: Topology, needed: float | None, limit: float) -> str:
    if needed is None:
        return f"it does not fit on a device of {topology.name}, which has {limit / 2**30:.2f} GiB"
    return (
        f"it does not fit: at least {needed / 2**30:.2f} GiB on a device of {topology.name}, which has "
        f"{limit / 2**30:.2f}: {(needed - limit) / 2**30:.2f} GiB too much"
    )


def _needed(message: str) -> float | None:
    """The bytes in the compiler's message, whose wording changes; None where it names none."""
    stated = re.search(r"\(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of", message)
    if stated is None:
        return None
    number, unit = stated[1] or stated[3], stated[2] or stated[4]
    return float(number) * 2 ** (10 * "KMGT".index(unit) + 10)
