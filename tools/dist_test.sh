#!/usr/bin/env bash
# Evaluate with several processes: dist_test.sh CONFIG CHECKPOINT GPUS [arguments of test.py]
#
# GPUS is the number of processes on this machine, one per GPU; without a GPU they share its
# cores. Environment variables: GPUS (unless given as an argument), PORT, NNODES, NODE_RANK,
# MASTER_ADDR, PYTHON.
set -euo pipefail

if [[ $# -lt 2 ]]; then
    echo "dist_test.sh: error: usage:" \
        "dist_test.sh CONFIG CHECKPOINT GPUS [arguments of test.py]" >&2
    exit 2
fi
CONFIG=$1
CHECKPOINT=$2
shift 2
if [[ $# -gt 0 && $1 != -* ]]; then
    GPUS=$1
    shift
fi

TOOLS=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$(dirname -- "$TOOLS")${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -m ddf_mm.engine.torchrun "${GPUS:-}" \
    "$TOOLS/test.py" "$CONFIG" "$CHECKPOINT" --launcher pytorch "$@"
