#!/usr/bin/env bash
# Evaluate on a Slurm cluster:
# slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of test.py]
#
# Environment variables: GPUS (processes in all), GPUS_PER_NODE (0 on nodes without a GPU),
# CPUS_PER_TASK, SRUN_ARGS (more arguments for srun), PYTHON.
set -euo pipefail

if [[ $# -lt 4 ]]; then
    echo "slurm_test.sh: error: usage:" \
        "slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of test.py]" >&2
    exit 2
fi
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/slurm_run.sh" "$1" "$2" \
    test.py "$3" "$4" "${@:5}"
