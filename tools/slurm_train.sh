#!/usr/bin/env bash
# Train on a Slurm cluster:
# slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments of train.py]
#
# Environment variables: GPUS (processes in all), GPUS_PER_NODE (0 on nodes without a GPU),
# CPUS_PER_TASK, SRUN_ARGS (more arguments for srun), PYTHON.
set -euo pipefail

if [[ $# -lt 4 ]]; then
    echo "slurm_train.sh: error: usage:" \
        "slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments of train.py]" >&2
    exit 2
fi
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/slurm_run.sh" "$1" "$2" \
    train.py "$3" --work-dir="$4" "${@:5}"
