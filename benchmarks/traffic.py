"""What each kind of kernel of a training step's GPU program reads and writes, compiled for a GPU that is not here.

    python benchmarks/traffic.py [--gpu h200] [--rows 64] [--length 1024] [--json FILE]

GPT-2, 124M by default, in bfloat16, its layers in line. Needs jax's CUDA plugin for its compiler (docs/pods.md), and no
GPU. Bytes are those of the operands and results of the optimized program's instructions; what a kernel reads twice, or
finds in the cache, the program does not say. Without a GPU XLA tries no variants: it takes its own kernels for matmuls,
where it would take cuBLAS's on the device. Milliseconds are bytes over the memory's bandwidth; kernels do not reach it.
"""

import collections
import re

import record

from meshgpt.config import Data, Run
from meshgpt.hardware import topologies
from meshgpt.models.layers import Execution
from meshgpt.models.model import GPT2Config
from meshgpt.planning import aot, hlo

_MOVES_NOTHING = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(.*)")
_KINDS = {  # of the names XLA gives; the first that is found
    "matmul": "matmuls", "gemm": "matmuls", "dot": "matmuls", "fmha": "attention", "transpose": "transposes",
    "copy": "copies", "reduce": "with sums over tokens or channels",
}  # fmt: skip


def moved(program: str) -> dict[str, list[int]]:
    """(bytes of each instruction) of an optimized program's entry, by kind."""
    sizes: dict[str, int] = {}
    found: dict[str, list[int]] = collections.defaultdict(list)
    for line in program[program.index("\nENTRY") :].splitlines():
        if not (parts := _INSTRUCTION.match(line)):
            continue
        name, kind, operation, operands, rest = parts.groups()
        sizes[name] = bytes_of(kind)
        if operation not in _MOVES_NOTHING:
            total = sizes[name] + sum(sizes.get(one, 0) for one in re.findall(r"%([\w.\-]+)", operands))
            target = re.search(r'custom_call_target="([^"]*)"', rest)
            found[kind_of(target[1] if target else name if operation == "fusion" else operation)].append(total)
    return found


def bytes_of(kind: str) -> int:
    """Of an HLO type, tuples too."""
    return sum(hlo.nbytes(dtype, dims) for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", kind))


def kind_of(name: str) -> str:
    return next((kind for part, kind in _KINDS.items() if part in name), "elementwise")


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--gpu", default="h200", choices=sorted(topologies.GPUS))
    for name, size in {"layers": 12, "width": 768, "heads": 12, "rows": 64, "length": 1024}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--remat", default="none")
    asked = parser.parse_args()
    begun = record.begin("traffic", asked)
    model = GPT2Config(
        vocab_size=50_257, n_positions=asked.length, n_layers=asked.layers, n_heads=asked.heads, d_model=asked.width
    )
    execution = Execution(unroll=0, remat=asked.remat)
    run = Run(model=model, data=Data(), steps=1 << 20, global_batch=asked.rows, execution=execution)
    aot.quiet_compiler()
    found = moved(aot.compile_for(run, topologies.parse(asked.gpu)).step.as_text() or "")
    kinds = {kind: {"kernels": len(each), "gigabytes": sum(each) / 1e9} for kind, each in found.items()}
    speed = topologies.GPUS[asked.gpu].traffic
    for kind, figures in sorted(kinds.items(), key=lambda one: -one[1]["gigabytes"]):
        seconds = figures["gigabytes"] * 1e9 / speed
        print(f"{kind:<40} {figures['kernels']:5} kernels {figures['gigabytes']:8.2f} GB {seconds * 1e3:8.2f} ms")
    begun.write({"kinds": kinds, "bytes_a_second": speed}, {})


if __name__ == "__main__":
    main()
