# One command each; running one again reuses what is installed.
#   make demo     train, evaluate and draw the digits recipe
#   make demo-detection, make demo-segmentation
#                 the same for small recipes on scenes of digits
#   make test     the whole test suite (ARGS="-k name" selects)
#   make lint     check the code         make format   rewrite it
#   make clean    delete what builds and tests leave, not the environment
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

STAMPS := $(VENV)/.stamps
INSTALL := PYTHON="$(PYTHON)" VENV="$(VENV)" bash requirements/install.sh
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

SCENE_DEMOS := demo-detection demo-segmentation
.PHONY: demo $(SCENE_DEMOS) test lint format clean
# Two pip runs in one environment must not overlap.
.NOTPARALLEL:

demo: $(STAMPS)/package
	PYTHON="$(VENV)/bin/python" bash tools/demo.sh

$(SCENE_DEMOS): demo-%: $(STAMPS)/toolchain $(STAMPS)/package $(STAMPS)/detection
	PYTHON="$(VENV)/bin/python" bash tools/demo_scenes.sh $*

test: $(STAMPS)/toolchain $(STAMPS)/package $(STAMPS)/detection $(STAMPS)/dev
	"$(VENV)/bin/python" -m pytest $(ARGS)

lint: $(STAMPS)/dev
	"$(VENV)/bin/ruff" check .
	"$(VENV)/bin/ruff" format --check .
	$(if $(CPP),"$(VENV)/bin/clang-format" --dry-run -Werror $(CPP))

format: $(STAMPS)/dev
	"$(VENV)/bin/ruff" check --fix .
	"$(VENV)/bin/ruff" format .
	$(if $(CPP),"$(VENV)/bin/clang-format" -i $(CPP))

clean:
	rm -rf build dist *.egg-info ddf_mm/_C*.so .pytest_cache .ruff_cache $(STAMPS)/package
	find . -path "./$(VENV)" -prune -o -name __pycache__ -prune -exec rm -rf {} +

# A stamp is written only after its install succeeded, and is out of date when its files changed.
$(STAMPS)/venv:
	$(INSTALL) venv
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/toolchain: | $(STAMPS)/venv
	$(INSTALL) toolchain
	@touch $@

$(STAMPS)/dev: requirements/dev.txt | $(STAMPS)/venv
	$(INSTALL) dev
	@touch $@

$(STAMPS)/classification: requirements/build.txt requirements/classification.txt | $(STAMPS)/venv
	$(INSTALL) classification
	@touch $@

$(STAMPS)/package: setup.py pyproject.toml $(CPP) $(STAMPS)/classification
	$(INSTALL) package
	@touch $@

$(STAMPS)/detection: requirements/detection.txt $(STAMPS)/classification
	$(INSTALL) detection
	@touch $@
