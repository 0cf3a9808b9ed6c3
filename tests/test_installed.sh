#!/usr/bin/env bash
# Installs ddf_mm as a user does, beside another torch than the compiler's, and tests it from
# elsewhere.
# usage: VENV=.venv test_installed.sh floor-torch|oldest-torch|newest-torch [ARGUMENT OF PYTEST]...
#
# First the source archive, without a compiler, which has to work on the formula; then the wheel,
# compiled in VENV with its torch, which has to pass the tests of the ops. With oldest-torch, which
# has OpenMMLab's own packages, the wheel also has to pass the tests that use these, and its tools
# have to train and test its recipe for digits. With floor-torch, which loads no wheel, the
# source archive has to pass the tests of the formula, of the layers and of the engine.
# VENV-floor-torch and its like hold nothing of VENV; install.sh makes them.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
torch=$1
shift
build=$(cd "${VENV:-.venv}" && pwd)/bin/python
python=$(cd "${VENV:-.venv}-$torch" && pwd)/bin/python
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

install() {
  "$python" -m pip install -q --force-reinstall --no-deps "$1"
  echo "ddf_mm: installed $(basename "$1") into $(dirname "$(dirname "$python")")"
}

cd "$root"
"$build" -c "from setuptools import build_meta; build_meta.build_sdist('$folder')" &> "$folder/log" ||
  { cat "$folder/log"; exit 1; }
cd "$folder"

CXX=no-such-compiler install "$folder"/ddf_mm-*.tar.gz
"$python" -W ignore - << 'END'
import torch
from ddf_mm.ops import backend_info, ddf, ddf_reference

assert backend_info()["cpu"] == "reference", backend_info()
x, channel, spatial = torch.randn(1, 4, 5, 6), torch.randn(1, 4, 3, 3), torch.randn(1, 9, 5, 6)
assert torch.equal(ddf(x, channel, spatial), ddf_reference(x, channel, spatial))
END

# A worker computes with one thread, as in `make test`.
run_tests() {
  OMP_NUM_THREADS=1 "$python" -m pytest -c "$root/pyproject.toml" -p no:cacheprovider \
    -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder -m "not any_torch" "$@"
}

if [ "$torch" = floor-torch ]; then
  run_tests "$root"/tests/{ops,layers,contrib,engine} "$@"
  exit
fi

# As `make wheel` compiles it, from the objects that the install in VENV left in build/temp.*.
(cd "$root" &&
  TORCH_CUDA_ARCH_LIST=none DDF_MM_WITH_OPS=1 "$build" -m pip wheel -q --no-build-isolation --no-deps -w "$folder" .)
install "$folder"/ddf_mm-*.whl
"$python" - << 'END'
import platform
from pathlib import Path

import torch
import ddf_mm
from ddf_mm.ops import backend_info, library, nvrtc

print(f"ddf_mm: {ddf_mm.__file__}, Python {platform.python_version()}, torch {torch.__version__}")
info = backend_info()
print(f"ddf_mm: {info}")
assert info["cpu"] == "compiled", info
# A CPU build of torch in VENV compiles no CUDA ops, one here does not load them.
if list(Path(ddf_mm.__file__).parent.glob("_C_cuda*")) and torch.version.cuda:
    assert info["cuda"] == "compiled on this machine", info
    name = next(n for n in nvrtc.names(library.cuda_library()) if "::forward_3x3<" in n)
    for arch in (75, 90, 120):
        assert nvrtc.compile_kernel(name, arch).code.startswith(b"\x7fELF")
    print(f"ddf_mm: NVRTC {nvrtc.version()} compiles {name} for sm_75, sm_90 and sm_120")
END
# Another torch calls the same library, so these tests cover what may differ: dispatch,
# autograd, the compiler, and what of PyTorch the formula uses, with every dtype, layout and
# direction. The file left out looks at the library in the checkout.
tests=("$root/tests/ops" --ignore="$root/tests/ops/test_instruction_sets.py")
if [ "$torch" = oldest-torch ]; then
  # Those of OpenMMLab's interfaces.
  tests+=("$root"/tests/layers/test_{mmcv_layers,weight_decay}.py "$root"/tests/test_registry.py
    "$root"/tests/models/test_{ddf_resnet,ddf_up_net,pretrained}.py)
  # The tools of the wheel, with one iteration.
  tools=$("$python" -c 'import ddf_mm; print(ddf_mm.__path__[0])')/.mim/tools
  recipe=ddf_mm::classification/ddf-mul-resnet26_digits.py
  "$python" "$tools/train.py" "$recipe" --work-dir digits --cfg-options train_cfg.max_epochs=1 \
    train_dataloader.dataset.indices=64
  "$python" "$tools/test.py" "$recipe" "$(cat digits/last_checkpoint)" --work-dir digits
fi
DDF_MM_REQUIRE_OPS=1 run_tests "${tests[@]}" "$@"
