#!/bin/sh
# The CIFAR-10 table (VGG16, 50 % and 80 % saved) on one GPU, in pieces of at most nine minutes.
#
#     LRMANIFOLD_DATA=... benchmarks/robustness/cifar_gpu.sh [MINUTES] [OPTION ...]
#
# One piece a call: exit status 75 says that there is more to do, 0 that the table is complete.
# Call it again, on the same runs/ folder, until then; nothing is repeated. Or all at once:
#
#     until benchmarks/robustness/cifar_gpu.sh; do [ $? -eq 75 ] || break; done
set -eu
cd "$(dirname "$0")/../.."
minutes=${1:-8}
[ $# -gt 0 ] && shift
exec "${PYTHON:-.venv/bin/python}" -m benchmarks.robustness cifar-vgg16 \
    --device cuda --amp --minutes "$minutes" "$@"
