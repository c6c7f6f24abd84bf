#!/usr/bin/env bash
# The benchmarks on a GPU in two calls of under nine minutes each:
#
#     bash benchmarks/speed/gpu.sh 1
#     bash benchmarks/speed/gpu.sh 2
#
# From the repository's root. PYTHON chooses the interpreter, OUT the folder of the results, and
# DEVICE=cpu FLAGS=--quick tries the script itself where there is no GPU. Every benchmark has a time
# limit of its own, so one that is too slow costs its own results and not those of the others.
set -u
PYTHON=${PYTHON:-python}
OUT=${OUT:-benchmarks/results}
DEVICE=${DEVICE:-cuda}
FLAGS=${FLAGS:-}
failed=0

bench() { # name, seconds, further options
    local name=$1 limit=$2
    shift 2
    # shellcheck disable=SC2086  # FLAGS is a list of words
    timeout --signal=INT --kill-after=10 "$limit" "$PYTHON" -m "benchmarks.speed.$name" \
        --device "$DEVICE" --output "$OUT" $FLAGS "$@" || {
        echo "$name: stopped with code $?" >&2
        failed=1
    }
}

launches() { # kernels of a steady step; without a GPU on torch's meta device
    local device=$DEVICE
    [ "$device" = cpu ] && device=meta
    timeout --kill-after=10 60 "$PYTHON" -m benchmarks.speed.launches --device "$device" \
        --output "$OUT" || {
        echo "launches: stopped with code $?" >&2
        failed=1
    }
}

case ${1:-} in
    1)
        launches
        bench step 150
        bench accelerator 130
        bench layer 80
        bench clip 60
        bench retractions 60
        ;;
    2)
        bench training 330
        bench memory 70
        bench scaling 60
        bench drift 60
        ;;
    *)
        echo "usage: bash benchmarks/speed/gpu.sh 1|2" >&2
        exit 2
        ;;
esac
exit "$failed"
