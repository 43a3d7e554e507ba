#!/usr/bin/env bash
# Train on one machine with one or more NVIDIA GPUs: install what its driver needs, train, go on after a crash.
#
#   launch/gpu.sh configs/gptj_6b.py --mesh.fsdp -1 --mesh.tensor 1 [--flags of the recipe]
#
# Machine: any with NVIDIA's driver (525 or newer), Python 3.11 or newer, and this checkout. One process drives all GPUs.
# Hours:   `meshgpt compile RECIPE --topology h100x8` estimates them; GPT-2 124M on 10 billion tokens takes one H100
#          about six hours.
# Cost:    hours x the price of the machine.
# Set:     VENV         the virtual environment to make or use (.venv)
#          MAX_CRASHES  crashes before giving up (3)
# Exit:    that of the training: 0 finished, or stopped by SIGTERM or Ctrl-C and saved; 2 something to mend.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv} MAX_CRASHES=${MAX_CRASHES:-3}

say() { printf '[gpu] %s\n' "$*" >&2; }
if [[ $# == 0 || $1 == -* ]]; then
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
fi

driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || true
[[ $driver =~ ^([0-9]+)\. ]] || { say "nvidia-smi finds no GPU: install NVIDIA's driver, or train on the CPU"; exit 2; }
# CUDA 13 needs a driver of release 580 or newer.
extra=cuda12
if ((BASH_REMATCH[1] >= 580)); then extra=cuda13; fi

[[ -x $VENV/bin/python ]] || python3 -m venv "$VENV"
say "driver $driver: installing meshgpt[$extra] in $VENV"
"$VENV/bin/pip" install -q -e ".[$extra]"

crashes=0
while :; do
    "$VENV/bin/python" -m meshgpt.train "$@" &
    child=$!
    trap 'kill -TERM $child' TERM INT
    code=0
    wait "$child" || code=$?
    # A signal ends the first wait; the run is then saving.
    while kill -0 "$child" 2>/dev/null; do code=0; wait "$child" || code=$?; done
    case $code in 0 | 2 | 130 | 143) exit "$code" ;; esac
    crashes=$((crashes + 1))
    [[ $crashes -le $MAX_CRASHES ]] || { say "gave up after $crashes crashes"; exit "$code"; }
    say "the training ended with code $code: starting again from the newest checkpoint ($crashes of $MAX_CRASHES)"
    sleep "$crashes"
done
