"""The share of a run's wall time that is training steps, with data, logging, validation and checkpoints on.

    python benchmarks/goodput.py [RECIPE] [--steps 500] [--json FILE]

The run is a process of its own, as its users start it; the figures are those of the line that ends every run. Compiling
and what comes before the loop are not in them, evaluations and saves are.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import record

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("recipe", nargs="?", default=str(ROOT / "configs" / "quickstart.py"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--eval-every", type=int, default=250)
    parser.add_argument("--eval-batches", type=int, default=10, help="global batches of each evaluation")
    parser.add_argument("--save-every", type=int, default=100)
    args = parser.parse_args()
    begun = record.begin("goodput", args)
    with tempfile.TemporaryDirectory() as room:
        flags = {
            "steps": args.steps, "eval-every": args.eval_every, "eval-batches": args.eval_batches,
            "checkpointing.every": args.save_every, "data.prepare.out": f"{room}/data", "run-dir": f"{room}/run",
        }  # fmt: skip
        command = [sys.executable, "-m", "meshgpt.train", args.recipe]
        command += [f"--{name}={value}" for name, value in flags.items()]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.strip())
        if process.wait():
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    line = next(line for line in lines if "training steps " in line)
    shares = {what.strip(): float(share) for what, share in re.findall(r"([a-z ]+) ([\d.]+)%", line)}
    begun.write({"percent": shares, "line": line}, {})


if __name__ == "__main__":
    main()
