#!/usr/bin/env bash
# Train with several processes: dist_train.sh CONFIG GPUS [arguments of train.py]
#
# GPUS is the number of processes on this machine, one per GPU; without a GPU they share its
# cores. Environment variables: GPUS (unless given as an argument), PORT, NNODES, NODE_RANK,
# MASTER_ADDR, PYTHON.
set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "dist_train.sh: error: usage: dist_train.sh CONFIG GPUS [arguments of train.py]" >&2
    exit 2
fi
CONFIG=$1
shift
if [[ $# -gt 0 && $1 != -* ]]; then
    GPUS=$1
    shift
fi

TOOLS=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$(dirname -- "$TOOLS")${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -m ddf_mm.engine.torchrun "${GPUS:-}" \
    "$TOOLS/train.py" "$CONFIG" --launcher pytorch "$@"
