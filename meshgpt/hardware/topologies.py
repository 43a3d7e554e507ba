"""The slices of Cloud TPU that can be rented, the GPU machines, and what each device can do: data with sources.

Names: `v3-256` as it is rented (the number counts TensorCores up to v4 and on v5p, chips on v5e and v6e), `v3:8x16` by
its chips, `2xv5e-256` for two slices, `h100x8` for the GPUs of one machine, `rtx3060` for a single one.
"""

import dataclasses
import difflib
import math
import re

from meshgpt.errors import UserError

_GIB = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """One generation of TPU.

    number: what the number of a name counts in a chip (1: chips, 2: TensorCores). devices: JAX devices of a chip.
    memory: bytes that a program may use on a device; as libtpu 0.0.42 states them when one does not fit.
    link: bytes a second of one link between chips, one way. links: of a device to its neighbours along one axis.
    network: bytes a second of a device to other slices. splash: whether the splash attention kernel compiles for it.
    wraps: the length from which on an axis closes to a ring; all axes must have it where `torus`.
    """

    number: int
    devices: int
    memory: int
    link: float
    network: float
    splash: bool
    wraps: int
    torus: bool
    options: tuple[tuple[str, str], ...] = ()
    slices: tuple[str, ...]


# Sources are named in each row: "page" is Google Cloud's of that generation, "book" Austin et al. 2025 ("How to Scale
# Your Model", chapter 2), "paper" Jouppi et al. 2020 ("A Domain-Specific Supercomputer for Training Deep Neural
# Networks"), quoted from memory. On v4 and v5p every slice of whole 4x4x4 cubes is a torus, on v5e and v6e an axis of
# 16 chips is a ring (book); on v2 and v3 only the whole pod. A device of v2 and v3 is half a chip and has half of its
# links.
GENERATIONS = {
    # Names: torchx's list of TPU types. Not confirmed: shapes above 4x4; links, 496 Gbit/s (paper); network, that of
    # v3.
    "v2": Generation(
        number=2, devices=2, memory=int(7.5 * _GIB), link=62e9 / 2, network=1.5e9, splash=False, wraps=16, torus=True,
        slices=("2x2", "4x4", "8x8", "8x16", "16x16"),
    ),
    # Names: torchx's list; shapes: GKE's table. Links: 656 Gbit/s (paper), and 340 TB/s of all-reduce in a pod (page)
    # are 4 of 83 GB/s a chip; the book has 100. Not confirmed: the network, 100 Gbit/s for the 8 devices of a host.
    "v3": Generation(
        number=2, devices=2, memory=int(15.5 * _GIB), link=82e9 / 2, network=1.5e9, splash=False, wraps=32, torus=True,
        slices=("2x2", "4x4", "4x8", "8x8", "8x16", "16x16", "16x32", "32x32"),
    ),
    # Slices: MaxText's table of accelerators. Links: book, and 1.1 PB/s of all-reduce in a pod (page) are 6 of 45 GB/s
    # a chip. Network: book, 25 GB/s a host of 4 chips.
    "v4": Generation(
        number=2, devices=1, memory=int(30.75 * _GIB), link=45e9, network=6.25e9, splash=True, wraps=4, torus=True,
        options=(("chip_config_name", "megacore"),),
        slices=("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x4x12", "4x8x8", "8x8x8", "8x8x12", "8x8x16",
                "8x16x16"),
    ),
    # Slices: page. Links: book. Network: page, 6.4 Tbit/s for 256 chips.
    "v5e": Generation(
        number=1, devices=1, memory=int(15.75 * _GIB), link=45e9, network=3.125e9, splash=True, wraps=16, torus=False,
        slices=("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    ),
    # Slices: page. Links: book. Network: page, 50 Gbit/s a chip.
    "v5p": Generation(
        number=2, devices=1, memory=int(95.7 * _GIB), link=90e9, network=6.25e9, splash=True, wraps=4, torus=True,
        slices=("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x12", "8x8x16", "8x12x16",
                "8x16x16", "12x16x16", "16x16x16", "16x16x24"),
    ),
    # Slices: page. Links: book. Not found again: the network, 100 Gbit/s a chip.
    "v6e": Generation(
        number=1, devices=1, memory=int(31.25 * _GIB), link=90e9, network=12.5e9, splash=True, wraps=16, torus=False,
        slices=("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU of a machine of up to eight.

    kind: as CUDA names it. capability: CUDA's compute capability. cores: multiprocessors, at `clock` GHz.
    memory: bytes. cache: of the second level, bytes. traffic: bytes of memory a second. link: bytes a second to the
    other GPUs, one way: NVLink's, else those of 16 lanes of PCIe 4.
    """

    kind: str
    capability: tuple[int, int]
    cores: int
    clock: float
    memory: int
    cache: int
    traffic: int
    link: float


_MIB = 1 << 20

# Memory, cores, cache and traffic of H100 and A100 are those of XLA's own target configs. GeForce: public logs of
# deviceQuery, with the least memory of any driver (newer ones keep more of it); traffic as sold. NVLink: data sheets,
# 600 (A100) and 900 GB/s (H100, H200) both ways together. PCIe 4: 16 GT/s x 16 lanes x 128/130. Of H200, XLA's config
# has 141.0 GiB and this cache, logs of cards this memory, and one of them a cache of 60 MiB.
GPUS = {
    "h100": Gpu(
        kind="NVIDIA H100 80GB HBM3", capability=(9, 0), cores=132, clock=1.98, memory=84_929_347_584,
        cache=50 * _MIB, traffic=3_352_320_000_000, link=450e9,
    ),
    "h200": Gpu(
        kind="NVIDIA H200", capability=(9, 0), cores=132, clock=1.98, memory=150_109_880_320,
        cache=50 * _MIB, traffic=4_800_000_000_000, link=450e9,
    ),
    "a100": Gpu(
        kind="NVIDIA A100-SXM4-80GB", capability=(8, 0), cores=108, clock=1.41, memory=85_100_068_864,
        cache=40 * _MIB, traffic=2_039_040_000_000, link=300e9,
    ),
    "rtx3060": Gpu(
        kind="NVIDIA GeForce RTX 3060", capability=(8, 6), cores=28, clock=1.78, memory=12_587_106_304,
        cache=2_359_296, traffic=360_000_000_000, link=31.5e9,
    ),
    "rtx3090": Gpu(
        kind="NVIDIA GeForce RTX 3090", capability=(8, 6), cores=82, clock=1.70, memory=25_206_325_248,
        cache=6 * _MIB, traffic=936_000_000_000, link=31.5e9,
    ),
    "rtx4090": Gpu(
        kind="NVIDIA GeForce RTX 4090", capability=(8, 9), cores=128, clock=2.52, memory=25_250_627_584,
        cache=72 * _MIB, traffic=1_008_000_000_000, link=31.5e9,
    ),
}  # fmt: skip
GPU_COUNTS = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """What was asked for. chips: of one slice (TPU) or GPUs, along each axis. name: as it is rented."""

    name: str
    generation: str
    chips: tuple[int, ...]
    slices: int = 1

    @property
    def is_tpu(self) -> bool:
        return self.generation in GENERATIONS

    @property
    def chip_count(self) -> int:
        return math.prod(self.chips) * self.slices

    @property
    def device_count(self) -> int:
        return self.chip_count * (GENERATIONS[self.generation].devices if self.is_tpu else 1)

    @property
    def memory(self) -> int:
        """Bytes of one device."""
        return GENERATIONS[self.generation].memory if self.is_tpu else GPUS[self.generation].memory

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Which axes of a slice close to a ring."""
        kind = GENERATIONS[self.generation]
        if kind.torus and kind.wraps == 4:
            return (all(length % 4 == 0 for length in self.chips),) * len(self.chips)
        if kind.torus:
            return (all(length == kind.wraps for length in self.chips),) * len(self.chips)
        return tuple(length == kind.wraps for length in self.chips)


def parse(text: str) -> Topology:
    """The topology that `text` names.

    Raises:
      UserError: a slice that cannot be rented, with the nearest that can.
    """
    name = text.strip().lower()
    gpu = re.fullmatch(r"([a-z]+\d+)(?:x(\d+))?", name)
    if gpu and gpu[1] in GPUS:
        count = int(gpu[2] or 1)
        if count in GPU_COUNTS:
            return Topology(name=f"{gpu[1]}x{count}", generation=gpu[1], chips=(count,))
        raise _unknown(text)
    parts = re.fullmatch(r"(?:(\d+)x)?(v\d+[ep]?)([-:])([\dx]+)", name)
    if not parts or parts[2] not in GENERATIONS or (parts[1] is not None and int(parts[1]) < 1):
        raise _unknown(text)
    slices, generation, sized = int(parts[1] or 1), parts[2], parts[3] == "-"
    for shape in GENERATIONS[generation].slices:
        if parts[4] == (rented_number(generation, shape) if sized else shape):
            more = f"{slices}x" if slices > 1 else ""
            rented = f"{more}{generation}-{rented_number(generation, shape)}"
            return Topology(name=rented, generation=generation, chips=_lengths(shape), slices=slices)
    raise _unknown(text)


def rented_number(generation: str, shape: str) -> str:
    """The number in the name of a slice: "256" for v3's 8x16."""
    return str(math.prod(_lengths(shape)) * GENERATIONS[generation].number)


def names() -> list[str]:
    """All names that can be rented."""
    tpus = [f"{kind}-{rented_number(kind, shape)}" for kind, of in GENERATIONS.items() for shape in of.slices]
    return tpus + [f"{gpu}x{count}" for gpu in GPUS for count in GPU_COUNTS]


def _lengths(shape: str) -> tuple[int, ...]:
    return tuple(int(length) for length in shape.split("x"))


def _unknown(text: str) -> UserError:
    kind = re.match(r"(?:\d+x(?=v))?(v\d+[ep]?|[a-z]+\d+)", text.strip().lower())
    known = [name for name in names() if kind and re.split("[-x]", name)[0] == kind[1]]
    if known:
        asked = int((re.findall(r"\d+", text) or ["0"])[-1])
        near = sorted(known, key=lambda name: abs(int(name.rpartition("-" if "-" in name else "x")[2]) - asked))[:4]
    else:
        near = difflib.get_close_matches(text.lower(), names(), n=4, cutoff=0.3) or ["v3-256", "v5e-256", "h100x8"]
    return UserError(
        f"--topology {text}: no such slice can be rented; the nearest are {', '.join(near)}. "
        "Names: v3-256, or v3:8x16 by its chips; 2xv5e-256 for two slices; h100x8 or rtx3060 for GPUs"
    )
