#!/usr/bin/env bash
# Everything that wants a CUDA device, in one command: build the ops for the GPU present, run every
# CUDA test, look for invalid accesses and races, and time the operation. gpu_check.sh [OUT]
#
# OUT (default: benchmarks) receives gpu_check.txt, with the device and the versions, and the
# timings as JSON. From the environment: PYTHON. Stops with the first failure's status.
set -euo pipefail

TOOLS=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname -- "$TOOLS")
PYTHON=${PYTHON:-python}
mkdir -p "${1:-$ROOT/benchmarks}"
OUT=$(cd -- "${1:-$ROOT/benchmarks}" && pwd)
cd "$ROOT"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

"$PYTHON" - << 'END' | tee "$OUT/gpu_check.txt"
import datetime
import sys

import torch

if not torch.cuda.is_available():
    sys.exit("gpu_check.sh: error: torch sees no CUDA device")
print(f"{datetime.date.today()}  {torch.cuda.get_device_name()}  torch {torch.__version__}")
END

DDF_MM_WITH_OPS=1 FORCE_CUDA=1 "$PYTHON" setup.py -q build_ext --inplace
DDF_MM_REQUIRE_OPS=1 "$PYTHON" -m pytest -q -m cuda tests/ops | tee -a "$OUT/gpu_check.txt"

SANITIZER=${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer
for tool in memcheck racecheck synccheck; do
    echo "== compute-sanitizer $tool" | tee -a "$OUT/gpu_check.txt"
    "$SANITIZER" --tool "$tool" --error-exitcode 1 "$PYTHON" -m pytest -q -m cuda \
        tests/ops/test_ddf.py -k "loop and 3-dilation1-stride1" 2>&1 | tee -a "$OUT/gpu_check.txt"
done

for dtype in float32 bfloat16; do
    for pass in "" --backward; do
        "$PYTHON" "$TOOLS/benchmark.py" op --device cuda --dtype "$dtype" $pass \
            --json "$OUT/op_cuda_$dtype${pass/--/_}.json" | tee -a "$OUT/gpu_check.txt"
    done
done
