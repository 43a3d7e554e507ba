#!/usr/bin/env bash
# Train with N processes on this machine, as a pod of N hosts would: to try a mesh, a recipe or a failure before renting.
#
#   launch/local.sh 4 configs/quickstart.py --mesh.data 4 [--flags of the recipe]
#
# Machine: this one; CPU by default. A GPU machine needs no such thing: one process drives all its GPUs (gpu.sh).
# Hours:   longer than with one process: they share its cores.
# Cost:    none.
# Set:     DEVICES   virtual CPU devices of each process (1)
#          PORT      of the coordinator, on the loopback interface only (a free one)
#          LAUNCH    more flags of `meshgpt launch`, such as "--elastic --max-restarts 20"
# Ctrl-C or SIGTERM saves on all of them at the same step. One that dies or hangs is started again with all the others,
# from the newest intact checkpoint. The run's folder has the output of all but the first in logs/.
set -euo pipefail
if [[ ! ${1:-} =~ ^[1-9][0-9]*$ || $# -lt 2 ]]; then
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
count=$1
shift
read -r -a flags <<<"${LAUNCH:-}"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
exec "${PYTHON:-python3}" -m meshgpt.cli launch --processes "$count" --devices "${DEVICES:-1}" --port "${PORT:-0}" \
    "${flags[@]+"${flags[@]}"}" "$@"
