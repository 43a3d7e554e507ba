#!/usr/bin/env bash
# Train on a Cloud TPU slice: make or reuse it, install on every worker, train, go on after preemptions.
#
#   TYPE=v3-256 SHARE=10.0.0.2:/vol1 launch/tpu_pod.sh run configs/gptj_6b.py [--flags of the recipe]
#   launch/tpu_pod.sh log | status | stop | delete
#   DRY_RUN=1 launch/tpu_pod.sh run ...                 prints each gcloud command, runs none
#
# Machine: any Cloud TPU type: v2-8 ... v3-1024, v4-512, v5e-256, v5p-128, v6e-256; 2xv5e-256 is two slices.
# Hours:   `meshgpt compile RECIPE --topology $TYPE` estimates them. GPT-J 6B on v3-256: weeks.
# Cost:    chips x hours x the price of a chip-hour in your zone; billing goes on until `delete`. A v3-256 has 128 chips:
#          at 2 dollars a chip-hour, which you should look up, 256 dollars an hour.
# Set:     TYPE      the slice, as above
#          NAME      of the TPU and of its queued resource (meshgpt)
#          PROJECT, ZONE   where (gcloud's configuration)
#          PROVISION spot, reserved or on-demand (on-demand). Spot is taken away at any time; `run` then goes on.
#          RUNTIME   the VM's image (by TYPE)
#          SHARE     HOST:/PATH, an NFS share such as Filestore, mounted at ~/shared on every worker. Slices of more than
#                    one worker need it: the run's folder and the data must be the same files everywhere.
#          RUN_DIR   the run's folder on the workers (shared/runs/<recipe>)
#          POLL, MAX_CRASHES, DROP_LIMIT   seconds between looks (30); crashes before giving up (10; preemptions are not
#                    counted); ssh failures in a row before the slice is taken for lost (10)
# Exit:    0 finished or stopped; 1 gave up; 2 something to mend (a flag, quota, the installation).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NAME=${NAME:-meshgpt} TYPE=${TYPE:-} PROVISION=${PROVISION:-on-demand} SHARE=${SHARE:-}
POLL=${POLL:-30} MAX_CRASHES=${MAX_CRASHES:-10} DROP_LIMIT=${DROP_LIMIT:-10}
GRACE=120 # seconds that a run has to save in when it is asked to stop
JOB=.meshgpt-job # on a worker: the pid, the log and the exit code of the training in progress

say() { printf '[tpu_pod] %s\n' "$*" >&2; }
refuse() { say "$*"; exit 2; }
usage() { sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
dry() { [[ -n ${DRY_RUN:-} ]]; }

# Every call of gcloud goes through here.
tpu() {
    local command=(gcloud compute tpus "$@" ${ZONE:+"--zone=$ZONE"} ${PROJECT:+"--project=$PROJECT"} --quiet)
    if dry; then { printf '%q ' "${command[@]}" && echo; } >&3; else "${command[@]}"; fi
}

slices() { if [[ $TYPE =~ ^([0-9]+)x(.+)$ ]]; then echo "${BASH_REMATCH[1]}"; else echo 1; fi; }
slice_type() { local t=${TYPE#[0-9]*x}; echo "${t/#v5e-/v5litepod-}"; }
nodes() {
    local count i
    count=$(slices)
    if [[ $count == 1 ]]; then echo "$NAME"; else for ((i = 0; i < count; i++)); do echo "$NAME-$i"; done; fi
}
runtime() {
    case $(slice_type) in
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v6e-*) echo v2-alpha-tpuv6e ;;
        *) echo tpu-ubuntu2204-base ;;
    esac
}

on() { # NODE WORKER COMMAND
    tpu tpu-vm ssh "$1" --worker="$2" --command="$3"
}
everywhere() { # COMMAND
    local node
    for node in $(nodes); do on "$node" all "$1" || return 1; done
}
first() { nodes | head -n 1; }

state() { # of the queued resource; NONE where there is none
    local found
    if found=$(tpu queued-resources describe "$NAME" --format='value(state.state)' 2>"$scratch/describe"); then
        echo "${found:-NONE}"
    elif grep -qiE 'not.?found' "$scratch/describe"; then
        echo NONE
    else
        say "cannot ask for the state of $NAME: $(tail -n 3 "$scratch/describe")"
        echo UNKNOWN
    fi
}
healthy() { # whether every node is there and ready: a preempted one is not, whatever its queued resource says
    local node found
    for node in $(nodes); do
        found=$(tpu tpu-vm describe "$node" --format='value(state)' 2>/dev/null) || return 1
        dry || [[ $found == READY ]] || return 1
    done
}

create() {
    local count place how=()
    count=$(slices)
    case $PROVISION in
        spot) how=(--spot) ;;
        reserved) how=(--reserved) ;;
        on-demand) ;;
        *) refuse "PROVISION=$PROVISION: give spot, reserved or on-demand" ;;
    esac
    if [[ $count == 1 ]]; then place=("--node-id=$NAME"); else place=("--node-count=$count" "--node-prefix=$NAME"); fi
    say "asking for $TYPE ($PROVISION) as $NAME"
    tpu queued-resources create "$NAME" "${place[@]}" --accelerator-type="$(slice_type)" \
        --runtime-version="${RUNTIME:-$(runtime)}" "${how[@]}" 2>&1 | tee "$scratch/create" >&2 && return
    if grep -qiE 'quota|RESOURCE_EXHAUSTED' "$scratch/create"; then
        refuse "no quota for $TYPE ($PROVISION) in ${ZONE:-this zone}: ask for it in the console (IAM, Quotas), or try" \
            "another ZONE, PROVISION=spot, or a smaller TYPE"
    fi
    refuse "the request was refused; see above"
}

remove() {
    say "deleting $NAME"
    tpu queued-resources delete "$NAME" --force
}

ensure() { # a slice that is ready, made where there is none
    local now last=''
    if dry; then state >/dev/null && create && healthy && return; fi
    while :; do
        now=$(state)
        [[ $now == "$last" ]] || say "$NAME is $now"
        last=$now
        case $now in
            NONE)
                [[ -n $TYPE ]] || refuse "TYPE is not set: for example TYPE=v3-256 (see --help)"
                create
                ;;
            ACTIVE)
                if healthy; then return; fi
                say "a node of $NAME is not ready (preempted, or in repair)"
                remove
                ;;
            SUSPENDED | FAILED)
                tpu queued-resources describe "$NAME" --format='value(state)' >&2 || true
                remove
                [[ $now == SUSPENDED ]] || refuse "the request failed (quota, or no such type here); see above"
                ;;
        esac
        sleep "$POLL"
    done
}

install() { # this checkout, as committed and changed, without what git ignores
    local node try work
    work="SHARE=$(printf %q "$SHARE") bash -c $(printf %q "$(declare -f prepare_worker); prepare_worker")"
    git ls-files -z --cached --others --exclude-standard | tar --null -T - -czf "$scratch/meshgpt.tgz"
    for try in 1 2 3; do
        say "installing on every worker (try $try)"
        for node in $(nodes); do
            tpu tpu-vm scp "$scratch/meshgpt.tgz" "$node:meshgpt.tgz" --worker=all || continue 2
            on "$node" all "$work" || continue 2
        done
        return 0
    done
    return 1
}

prepare_worker() { # runs on a worker
    set -Eeuo pipefail
    trap 'echo "installation failed on worker $(hostname)" >&2' ERR
    local python='' candidate
    mkdir -p ~/shared
    if [[ -n ${SHARE:-} ]]; then
        if ! mountpoint -q ~/shared; then
            command -v mount.nfs >/dev/null || { sudo apt-get update -q && sudo apt-get install -qy nfs-common; }
            sudo mount -t nfs "$SHARE" ~/shared
        fi
    fi
    rm -rf ~/meshgpt.new && mkdir ~/meshgpt.new && tar -xzf ~/meshgpt.tgz -C ~/meshgpt.new
    rm -rf ~/meshgpt && mv ~/meshgpt.new ~/meshgpt && ln -sfn ~/shared ~/meshgpt/shared
    for candidate in python3.13 python3.12 python3.11; do
        if command -v $candidate >/dev/null; then python=$candidate && break; fi
    done
    if [[ -z $python ]]; then
        sudo apt-get update -q && sudo apt-get install -qy python3.11 python3.11-venv && python=python3.11
    fi
    [[ -x ~/meshgpt-venv/bin/python ]] || "$python" -m venv ~/meshgpt-venv
    ~/meshgpt-venv/bin/pip install -q -e "$HOME/meshgpt[tpu]"
}

running() { # 0 yes, 1 no, 255 cannot tell
    on "$(first)" 0 "kill -0 \$(cat ~/meshgpt/$JOB/pid 2>/dev/null || echo none) 2>/dev/null && echo YES || echo NO" \
        >"$scratch/running" 2>/dev/null || return 255
    grep -q YES "$scratch/running"
}

start() { # detached, so that an ssh that drops takes nothing with it
    local job
    job="\$HOME/meshgpt-venv/bin/python -m meshgpt.train $(printf '%q ' "$@"); echo \$? >$JOB/exit"
    say "starting on every worker: python -m meshgpt.train $*"
    everywhere "cd ~/meshgpt && rm -rf $JOB && mkdir $JOB && \
{ setsid nohup bash -c $(printf %q "$job") >$JOB/log 2>&1 </dev/null & echo \$! >$JOB/pid; }"
}

follow() { # worker 0's log; gives the exit code of the run, or 255 where it was lost
    local seen=0 drops=0 code
    : >"$scratch/log"
    while :; do
        # tail ends with the run; the lines that were printed before a drop are not printed again
        on "$(first)" 0 "cd ~/meshgpt && tail -n +$((seen + 1)) --pid=\$(cat $JOB/pid) -F $JOB/log 2>/dev/null" \
            2>"$scratch/ssh" | tee -a "$scratch/log" || true
        dry && return
        seen=$(wc -l <"$scratch/log")
        if on "$(first)" 0 "cat ~/meshgpt/$JOB/exit 2>/dev/null || echo none" >"$scratch/exit" 2>>"$scratch/ssh"; then
            drops=0
            code=$(tail -n 1 "$scratch/exit")
            [[ ! $code =~ ^[0-9]+$ ]] || return "$code"
            code=0
            running || code=$?
            [[ $code != 1 ]] || { say "the run vanished from worker 0"; return 255; }
        else
            drops=$((drops + 1))
            say "the connection to worker 0 dropped ($drops of $DROP_LIMIT): $(tail -n 1 "$scratch/ssh")"
            [[ $drops -lt $DROP_LIMIT ]] && healthy || return 255
        fi
        sleep "$POLL"
    done
}

stop_workers() { # SIGTERM: the run saves on every worker at one step, and ends
    everywhere "cd ~/meshgpt 2>/dev/null && test -f $JOB/pid || exit 0; touch $JOB/stop; \
pkill -TERM -P \$(cat $JOB/pid); \
for i in \$(seq $GRACE); do kill -0 \$(cat $JOB/pid) 2>/dev/null || exit 0; sleep 1; done; exit 1"
}
was_preempted() { # of a run that ended well: whether it was told to, and not by `stop`
    tail -n 20 "$scratch/log" | grep -q '^stopped at step' &&
        ! on "$(first)" 0 "test -f ~/meshgpt/$JOB/stop" 2>/dev/null
}

attempt() { # one life of a slice; gives what `follow` gives
    local code=0
    ensure
    running || code=$?
    if dry || [[ $code == 1 ]]; then
        dry || stop_workers || say "an earlier run did not end on every worker"
        if ! install; then
            healthy || return 255
            refuse "the installation failed on a worker, three times; its last lines are above"
        fi
        if ! start "$@"; then
            say "the run did not start on every worker"
            stop_workers || true
            return 255
        fi
    elif [[ $code == 0 ]]; then
        say "a run is in progress on $NAME: following it"
    else
        say "worker 0 does not answer"
        return 255
    fi
    follow
}

run() {
    local recipe=${1:-} restarts=0 crashes=0 code why
    [[ -n $recipe && $recipe != -* ]] || refuse "which recipe? for example launch/tpu_pod.sh run configs/gptj_6b.py"
    [[ -f $recipe ]] || refuse "no recipe $recipe in $PWD"
    shift
    while :; do
        code=0
        attempt "$recipe" --run-dir "${RUN_DIR:-shared/runs/$(basename "$recipe" .py)}" "$@" || code=$?
        if dry; then return; fi
        if [[ $code == 0 ]] && ! was_preempted; then
            say "done. The slice is still there, and costs: launch/tpu_pod.sh delete"
            return
        fi
        case $code in
            0) why="it was told to stop and has saved" ;;
            2) refuse "the run cannot go on as it is; its message is above" ;;
            255) why="the slice was lost" ;;
            *)
                why="exit code $code"
                crashes=$((crashes + 1))
                [[ $crashes -le $MAX_CRASHES ]] || { say "gave up after $crashes crashes, the last with $why"; return 1; }
                ;;
        esac
        restarts=$((restarts + 1))
        say "the run ended: $why; restart $restarts"
        sleep "$POLL"
    done
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
exec 3>&1
command -v gcloud >/dev/null || dry || refuse "gcloud is not installed: see the Google Cloud SDK's pages"
verb=${1:-}
[[ $# == 0 ]] || shift
case $verb in
    run) run "$@" ;;
    log) follow ;;
    status) echo "$NAME: $(state)" && for node in $(nodes); do tpu tpu-vm describe "$node" --format='value(state,health)'; done ;;
    stop) stop_workers && say "stopped, saved. The slice is still there, and costs: launch/tpu_pod.sh delete" ;;
    delete) stop_workers 2>/dev/null || say "no run could be stopped"; remove ;;
    -h | --help | '') usage ;;
    *) refuse "no verb $verb: run, log, status, stop, delete" ;;
esac
