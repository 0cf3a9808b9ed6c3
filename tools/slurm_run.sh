#!/usr/bin/env bash
# Common part of slurm_train.sh and slurm_test.sh:
# slurm_run.sh PARTITION JOB_NAME SCRIPT [arguments of SCRIPT, a file in this folder]
#
# Environment variables: GPUS (processes in all), GPUS_PER_NODE (0 on nodes without a GPU),
# CPUS_PER_TASK, SRUN_ARGS (more arguments for srun), PYTHON.
set -euo pipefail

PARTITION=$1
JOB_NAME=$2
SCRIPT=$3
shift 3

TOOLS=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$(dirname -- "$TOOLS")${PYTHONPATH:+:$PYTHONPATH}"

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
PLACEMENT=()
if [[ $GPUS_PER_NODE -gt 0 ]]; then
    PLACEMENT=("--gres=gpu:$GPUS_PER_NODE" "--ntasks-per-node=$GPUS_PER_NODE")
fi

# SRUN_ARGS is a list of words; in bash 3 an empty array is an unbound variable.
# shellcheck disable=SC2086
exec srun -p "$PARTITION" \
    --job-name="$JOB_NAME" \
    --ntasks="${GPUS:-8}" \
    ${PLACEMENT[@]+"${PLACEMENT[@]}"} \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$TOOLS/$SCRIPT" "$@" --launcher=slurm
