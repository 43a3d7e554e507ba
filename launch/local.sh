#!/usr/bin/env bash
# Train with N processes on this machine, as a pod of N hosts would: to try a mesh, a recipe or a failure before renting.
#
#   launch/local.sh 4 configs/quickstart.py --mesh.data 4 [--flags of the recipe]
#
# Machine: this one; CPU by default. A GPU machine needs no such thing: one process drives all its GPUs (gpu.sh).
# Hours:   longer than with one process: they share its cores.
# Cost:    none.
# Set:     DEVICES   virtual CPU devices of each process (1)
#          PORT      of the coordinator, on the loopback interface only (8476)
#          LOGS      the folder for the output of the processes other than the first (logs)
# Ctrl-C or SIGTERM saves on all of them at the same step. One that dies takes the others with it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ ! ${1:-} =~ ^[1-9][0-9]*$ || $# -lt 2 ]]; then
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
fi
count=$1
shift
LOGS=${LOGS:-logs} PORT=${PORT:-8476}
mkdir -p "$LOGS"
export MESHGPT_COORDINATOR=127.0.0.1:$PORT MESHGPT_PROCESSES=$count
export JAX_NUM_CPU_DEVICES=${DEVICES:-1} JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

pids=()
for ((i = count - 1; i >= 0; i--)); do
    if [[ $i == 0 ]]; then output=/dev/stdout; else output=$LOGS/process-$i.log; fi
    MESHGPT_PROCESS_ID=$i "${PYTHON:-python3}" -m meshgpt.train "$@" >"$output" 2>&1 &
    pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
code=0
while [[ -n $(jobs -pr) ]]; do
    one=0
    wait -n || one=$?
    # 128 and more: a signal came and was passed on, or a process was killed by one.
    if [[ $one != 0 && $code == 0 ]]; then
        alive=$(jobs -pr | wc -l)
        [[ $one -le 128 || $alive -lt $count ]] || continue
        code=$one
        echo "[local] a process ended with code $code; the others are stopped. Their output is in $LOGS" >&2
        kill -KILL "${pids[@]}" 2>/dev/null || true
    fi
done
exit "$code"
