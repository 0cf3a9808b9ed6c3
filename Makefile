# Each target installs what it needs if that is missing.
#   make demo     train, evaluate and draw the digits recipe
#   make demo-detection, make demo-segmentation
#                 the same for small recipes on scenes of digits
#   make test-fast
#                 test the ops, with torch alone, in under two minutes on two cores
#   make test     the full test suite (ARGS="-k name" selects, ARGS="-n 0" is one process)
#   make test-oldest-torch, make test-newest-torch
#                 test source archive and wheel with other versions of torch than the compiler's,
#                 the oldest with OpenMMLab's own packages
#   make test-floor-torch
#                 test the source archive with a torch that is too old for the compiled ops
#   make compare-nvrtc
#                 compile every CUDA kernel by nvcc and by NVRTC (ARCH="75 90 120"), and compare
#   make wheel    the release wheel: ops for the CPU and every GPU that torch's NVRTC knows
#   make sdist    the source archive
#   make lint     check the code         make format   format it
#   make docs     build the site of docs/ in build/docs
#   make clean    delete the outputs of builds and tests, not the environment
PYTHON ?= python3
# The interpreter of a version, if it is installed; PYENV_VERSION lets pyenv find those that it keeps.
find_python = $(shell PYENV_VERSION=$(1) python$(1) -c 'import sys; print(sys.executable)' 2> /dev/null)
OLDEST_PYTHON ?= $(call find_python,3.10)
NEWEST_PYTHON ?= $(call find_python,3.13)
VENV ?= .venv
ARGS ?=
# Number of test processes.
# nproc counts no more cores than OMP_NUM_THREADS.
WORKERS ?= $(or $(shell env -u OMP_NUM_THREADS nproc 2> /dev/null),2)
export WORKERS

STAMPS := $(VENV)/.stamps
OTHER_TORCHES := floor-torch oldest-torch newest-torch
INSTALL := PYTHON="$(PYTHON)" VENV="$(VENV)" bash requirements/install.sh
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

SCENE_DEMOS := demo-detection demo-segmentation
.PHONY: demo $(SCENE_DEMOS) test test-fast $(OTHER_TORCHES:%=test-%) compare-nvrtc wheel sdist \
	check-tag docs lint format clean
# Two pip runs in one environment must not overlap.
.NOTPARALLEL:

demo: $(STAMPS)/classification $(STAMPS)/package
	PYTHON="$(VENV)/bin/python" bash tools/demo.sh

$(SCENE_DEMOS): demo-%: $(STAMPS)/toolchain $(STAMPS)/classification $(STAMPS)/package $(STAMPS)/detection
	PYTHON="$(VENV)/bin/python" bash tools/demo_scenes.sh $*

# One thread per worker: more threads than cores are very slow. The tests of a file run in one
# worker, which builds its fixtures once; tests/conftest.py orders the files.
PYTEST := OMP_NUM_THREADS=1 "$(VENV)/bin/python" -m pytest -n $(WORKERS) --dist loadfile \
	--no-loadscope-reorder

test: $(STAMPS)/toolchain $(STAMPS)/classification $(STAMPS)/package $(STAMPS)/detection $(STAMPS)/dev
	$(PYTEST) $(ARGS)

# test_registry.py is skipped where mmcv is not installed.
test-fast: $(STAMPS)/package $(STAMPS)/dev
	$(PYTEST) -m "not slow" tests/ops tests/test_registry.py $(ARGS)

# The wheel is compiled in $(VENV), with its torch.
$(OTHER_TORCHES:%=test-%): test-%: $(STAMPS)/package $(VENV)-%/.stamps/torch
	VENV="$(VENV)" bash tests/test_installed.sh $* $(ARGS)

# Needs nvcc, but no GPU. The library by name lists the kernels.
ARCH ?= 75 90 120
compare-nvrtc: $(STAMPS)/package
	"$(VENV)/bin/python" benchmarks/compare_nvrtc.py --arch $(ARCH)

# auditwheel finds the oldest glibc that will do and tags the wheel with it. torch brings its
# libraries; the audit fails unless all of it that these use is stable and both are there.
wheel: $(STAMPS)/build $(STAMPS)/release
	rm -rf build/wheel
	DDF_MM_WITH_OPS=1 TORCH_CUDA_ARCH_LIST=none \
		"$(VENV)/bin/python" -m pip wheel -v --no-build-isolation --no-deps -w build/wheel .
	"$(VENV)/bin/python" -m zipfile -e build/wheel/*.whl build/wheel
	"$(VENV)/bin/torch-abi-audit" -v --check both \
		build/wheel/ddf_mm/_C.abi3.so build/wheel/ddf_mm/_C_cuda.abi3.so
	PATH="$$PATH:$(abspath $(VENV)/bin)" "$(VENV)/bin/auditwheel" repair -w dist --exclude 'libtorch*.so' --exclude libc10.so build/wheel/*.whl

sdist: $(STAMPS)/build
	"$(VENV)/bin/python" -c 'from setuptools import build_meta; build_meta.build_sdist("dist")'

# make check-tag TAG=v0.1.0: fails unless the tag is the version of the sources.
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' ddf_mm/version.py)
check-tag:
	@test "$(TAG)" = "v$(VERSION)" || { echo "ddf_mm: tag $(TAG), version $(VERSION)" >&2; exit 1; }

lint: $(STAMPS)/dev
	"$(VENV)/bin/ruff" check .
	"$(VENV)/bin/ruff" format --check .
	$(if $(CPP),"$(VENV)/bin/clang-format" --dry-run -Werror $(CPP))
	"$(VENV)/bin/mypy"

# -W: a broken link or docstring is an error.
docs: $(STAMPS)/classification $(STAMPS)/package $(STAMPS)/dev
	"$(VENV)/bin/python" -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

format: $(STAMPS)/dev
	"$(VENV)/bin/ruff" check --fix .
	"$(VENV)/bin/ruff" format .
	$(if $(CPP),"$(VENV)/bin/clang-format" -i $(CPP))

clean:
	rm -rf build dist *.egg-info ddf_mm/_C*.so .mypy_cache .pytest_cache .ruff_cache $(STAMPS)/package
	find . -path "./$(VENV)" -prune -o -name __pycache__ -prune -exec rm -rf {} +

# A stamp is written after a successful install, and is out of date when its files change.
$(STAMPS)/venv:
	$(INSTALL) venv
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/toolchain: | $(STAMPS)/venv
	$(INSTALL) toolchain
	@touch $@

$(STAMPS)/dev: requirements/dev.txt requirements/docs.txt | $(STAMPS)/venv
	$(INSTALL) dev
	@touch $@

$(STAMPS)/build: requirements/build.txt | $(STAMPS)/venv
	$(INSTALL) build
	@touch $@

$(STAMPS)/release: requirements/release.txt $(STAMPS)/build
	$(INSTALL) release
	@touch $@

$(STAMPS)/classification: requirements/classification.txt $(STAMPS)/build
	$(INSTALL) classification
	@touch $@

$(STAMPS)/package: setup.py pyproject.toml $(CPP) $(STAMPS)/build
	$(INSTALL) package
	@touch $@

$(STAMPS)/detection: requirements/detection.txt $(STAMPS)/classification
	$(INSTALL) detection
	@touch $@

# The oldest torch with the oldest Python and the newest with the newest, if those are installed.
$(VENV)-oldest-torch/.stamps/torch: PYTHON := $(or $(OLDEST_PYTHON),$(PYTHON))
$(VENV)-newest-torch/.stamps/torch: PYTHON := $(or $(NEWEST_PYTHON),$(PYTHON))
$(VENV)-%/.stamps/torch: requirements/%.txt requirements/dev.txt
	PYTHON="$(PYTHON)" VENV="$(VENV)-$*" bash requirements/install.sh $*
	@mkdir -p $(@D) && touch $@
