#!/usr/bin/env bash
# Several plans at once on one GPU, for so many minutes:
#
#     ROOT=DATA OUT=DIR bash benchmarks/robustness/gpu.sh MINUTES PLAN:PROCESSES ...
#
# From the repository's root. Small networks keep a GPU busy only together, so each plan gets several
# processes, which share its work, under CUDA's MPS where that is there. The tables go on from those of the
# checkout; they lie in OUT/PLAN, also after a stop, to be taken home by
# `python -m benchmarks.robustness PLAN --take DIR/PLAN`. A process that breaks is started again twice.
set -u
PYTHON=${PYTHON:-python}
DEVICE=${DEVICE:-cuda}
PLANS=${PLANS:-benchmarks/results/robustness}
[ $# -ge 2 ] && [ -n "${OUT:-}" ] || {
    echo "usage: ROOT=DATA OUT=DIR bash $0 MINUTES PLAN:PROCESSES ..." >&2
    exit 2
}
OUT=$(realpath -m "$OUT") # MPS wants a whole path
end=$((SECONDS + $(awk -v m="$1" 'BEGIN { print int(60 * m) }')))
shift
export OMP_NUM_THREADS=1
mkdir -p "$OUT/logs"
if [ "$DEVICE" = cuda ] && command -v nvidia-cuda-mps-control > /dev/null; then
    export CUDA_MPS_PIPE_DIRECTORY=$OUT/mps CUDA_MPS_LOG_DIRECTORY=$OUT/mps
    mkdir -p "$OUT/mps"
    nvidia-cuda-mps-control -d
    # its clients end first: one that is killed at work takes the others with it
    trap 'echo quit | nvidia-cuda-mps-control' EXIT
fi

work() { # plan, number
    local left
    for _ in 1 2 3; do
        left=$(awk -v s=$((end - SECONDS)) 'BEGIN { print s / 60 }')
        "$PYTHON" -m benchmarks.robustness "$1" --device "$DEVICE" --threads 1 --minutes "$left" \
            ${ROOT:+--root "$ROOT"} --results "$OUT" --scratch "$OUT/scratch" --unregistered \
            >> "$OUT/logs/$1.$2" 2>&1
        case $? in 0 | 75) return 0 ;; esac # done, or the time is over
    done
    echo "$1: process $2 broke three times, see $OUT/logs/$1.$2" >&2
    return 1
}

running=()
for part in "$@"; do
    plan=${part%:*}
    mkdir -p "$OUT/$plan"
    cp -n "$PLANS/$plan"/plan.toml "$PLANS/$plan"/*.jsonl "$OUT/$plan/" 2> /dev/null
    for number in $(seq "${part##*:}"); do
        work "$plan" "$number" &
        running+=($!)
    done
done
failed=0
for process in "${running[@]}"; do wait "$process" || failed=1; done
wc -l "$OUT"/*/*.jsonl 2> /dev/null
exit "$failed"
