#!/usr/bin/env bash
# All checks that need a CUDA device: gpu_check.sh [STAGE ...] [OUT]
#
#   nvrtc     compiles the ops without kernels, as releases are, and the kernels by NVRTC, and runs
#             every CUDA test
#   build     compiles the ops for the GPU present, with all cores
#   test      runs every CUDA test: the cases of the CPU, strided and huge tensors, streams,
#             autocast, graph capture, gradcheck
#   memcheck, racecheck, synccheck
#             run small cases of every kernel under a tool of compute-sanitizer, which checks the
#             kernels of ddf_mm only
#   bench     times the operation and writes a table of it
#
# The default is all stages. After a failure the remaining steps still run; the last lines then list
# the failures, and the exit status is 1. Each stage writes OUT/gpu_check_STAGE.txt (OUT: by default
# benchmarks), which begins with the date, the device and the versions; bench also writes the times
# as JSON and gpu_check.md. OUT/gpu_check.tar.gz has all files. Environment variables: PYTHON,
# CUDA_HOME, MAX_JOBS.
set -uo pipefail

TOOLS=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname -- "$TOOLS")
PYTHON=${PYTHON:-$(command -v python || command -v python3 || echo python)}

stages=()
every="nvrtc build test memcheck racecheck synccheck bench"
while [[ " $every " == *" ${1:-none} "* ]]; do
    stages+=("$1")
    shift
done
# shellcheck disable=SC2206
[ ${#stages[@]} -gt 0 ] || stages=($every)
if [ $# -gt 1 ]; then
    echo "gpu_check.sh: error: at most one OUT after the stages, got: $*" >&2
    exit 2
fi
mkdir -p "${1:-$ROOT/benchmarks}" || exit 2
OUT=$(cd -- "${1:-$ROOT/benchmarks}" && pwd)
cd "$ROOT" || exit 2
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

# Two lines: the first line of every report, and the GPU's compute capability.
about=$("$PYTHON" - << 'END'
import datetime
import platform
import sys

import torch

if not torch.cuda.is_available():
    sys.exit("gpu_check.sh: error: torch finds no CUDA device")
print(
    f"{datetime.date.today()}  {torch.cuda.get_device_name()}  torch {torch.__version__}  "
    f"CUDA {torch.version.cuda}  Python {platform.python_version()}"
)
print("{}.{}".format(*torch.cuda.get_device_capability()))
END
) || exit 1

failures=()
# attempt NAME COMMAND...: adds the output to the stage's report and records a failure as NAME.
attempt() {
    local name=$1
    shift
    echo "== $name: $*" | tee -a "$report"
    "$@" 2>&1 | tee -a "$report" || failures+=("$stage: $name")
}

nvrtc() {
    DDF_MM_WITH_OPS=1 MAX_JOBS="${MAX_JOBS:-$(nproc)}" TORCH_CUDA_ARCH_LIST=none \
        attempt "compiling" "$PYTHON" setup.py -q build_ext --inplace
    attempt "kernels" "$PYTHON" -m ddf_mm.ops.precompile --jobs "$(nproc)"
    # Whether a small call has the result of the formula is seen here, too.
    attempt "backend" "$PYTHON" -c 'import ddf_mm.ops; info = ddf_mm.ops.backend_info(); print(info)
assert info["cuda"] == "compiled on this machine"'
    test_
}

build() {
    DDF_MM_WITH_OPS=1 FORCE_CUDA=1 MAX_JOBS="${MAX_JOBS:-$(nproc)}" \
        TORCH_CUDA_ARCH_LIST="${about##*$'\n'}" \
        attempt "compiling" "$PYTHON" setup.py -q build_ext --inplace
}

has_pytest() {
    "$PYTHON" -c "import pytest" 2> /dev/null && return
    attempt "pytest is not installed: pip install pytest" false
    return 1
}

test_() {
    has_pytest || return
    local parallel=() layers=()
    if "$PYTHON" -c "import xdist" 2> /dev/null; then parallel=(-n 4); fi
    if "$PYTHON" -c "import mmengine" 2> /dev/null; then layers=(tests/layers); fi
    DDF_MM_REQUIRE_OPS=1 attempt "CUDA tests" "$PYTHON" -m pytest -q -m cuda \
        tests/ops tests/tools/test_benchmark.py "${layers[@]}" "${parallel[@]}"
}

sanitize() {
    has_pytest || return
    local sanitizer
    sanitizer=$(PATH="${CUDA_HOME:-/usr/local/cuda}/bin:$PATH" command -v compute-sanitizer) || {
        attempt "compute-sanitizer was not found: set CUDA_HOME to a CUDA toolkit" false
        return
    }
    # Without torch's cache each tensor is a separate allocation with bounds known to memcheck. Names of
    # kernels are mangled: those of the namespace ddf::cuda.
    DDF_MM_REQUIRE_OPS=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 attempt "$stage" \
        "$sanitizer" --tool "$stage" --kernel-regex kns=_ZN3ddf4cuda --error-exitcode 1 \
        "$PYTHON" -m pytest -q -m cuda tests/ops -k "small_cases or each_gradient_alone or formula"
}

bench() {
    # Shapes from ResNet and FPN that exceed a GPU's cache.
    local shapes=(2,256,200,304 32,256,56,56 32,512,28,28 128,64,56,56)
    local pass options name peers reports=()
    for options in "" "--kernel-size 5" "--stride 2"; do
        for pass in forward grad_features backward; do
            name="op cuda $pass $options"
            name=$(tr -cs '[:alnum:]\n' _ <<< "${name//--/}")
            # The slow alternatives only once.
            peers=(--peers "depthwise conv" copy)
            [ "$options" != "" ] || [ "$pass" != forward ] || peers=()
            # shellcheck disable=SC2086
            attempt "${name%_}" "$PYTHON" "$TOOLS/benchmark.py" op --device cuda \
                --shapes "${shapes[@]}" --dtype float32 bfloat16 --pass "$pass" --repeats 5 \
                $options "${peers[@]}" --json "$OUT/${name%_}.json"
            [ ! -f "$OUT/${name%_}.json" ] || reports+=("$OUT/${name%_}.json")
        done
    done
    [ ${#reports[@]} -eq 0 ] || attempt "table" \
        "$PYTHON" "$ROOT/benchmarks/benchmark_table.py" "${reports[@]}" --out "$OUT/gpu_check.md"
}

for stage in "${stages[@]}"; do
    report=$OUT/gpu_check_$stage.txt
    echo "${about%%$'\n'*}" | tee "$report"
    case $stage in
        test) test_ ;;
        *check) sanitize ;;
        *) "$stage" ;;
    esac
done

(cd "$OUT" && shopt -s nullglob && tar -czf gpu_check.tar.gz gpu_check_*.txt gpu_check.md* ./*.json)

for failure in "${failures[@]}"; do
    echo "gpu_check.sh: error: failed: $failure" >&2
done
[ ${#failures[@]} -eq 0 ]
