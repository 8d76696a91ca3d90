# Everything runs in .venv, which the first target that needs it makes. `make` alone lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
FULL ?=
BENCH_ARGS ?=

# OpenMP threads that spin while they wait slow each other down when the machine is shared.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help env build bench test test-all lint format docs clean settings
.DELETE_ON_ERROR:

help:
	@echo 'make bench     fused ops and whole networks against PyTorch, in five minutes, results in build/bench'
	@echo '               FULL=1: all cases, hours, goes on where it was stopped; BENCH_ARGS="--threads 2": for both'
	@echo 'make test      the tests, without the slow ones'
	@echo 'make test-all  all the tests'
	@echo 'make lint      ruff, mypy, clang-format; changes nothing'
	@echo 'make format    ruff and clang-format, in place'
	@echo 'make docs      the pages of docs/, in build/docs'
	@echo 'make build     compiles what changed, in seconds; VISION_OPS_BUILD=cpu leaves nvcc out'
	@echo 'make env       only what bench and test need: .venv, torch, the package with its kernels'
	@echo 'make clean     removes what the build made, not .venv'
	@echo
	@echo 'PYTHON=python3        makes .venv; if it has torch >= 2.11, that torch is used and left as it is'
	@echo 'TORCH=torch==2.13.0   is installed otherwise; TORCH_INDEX=https://... names the package index for it'
	@echo 'VISION_OPS_BUILD=...  and the other variables of the build: see setup.py'

bench: env
	@status=0; for what in ops networks; do \
	  $(BIN)/python -m benchmarks $$what --out build/bench $(if $(filter 1,$(FULL)),--full) $(BENCH_ARGS) || status=$$?; \
	done; exit $$status

# Without the environment that pip makes for every build.
build: $(VENV)/.torch $(VENV)/.settings
	@test -e $(VENV)/.installed || $(MAKE) -s env
	@$(PIP) install 'setuptools>=70.1' ninja
	@$(PIP) install --no-build-isolation --no-deps -e .
	@$(BIN)/python -c '$(SHOW_BUILT)'
	@touch $(VENV)/.installed

# A process per core, but not a hundred that all import torch. Each starts with a stretch of the tests, so that few
# processes make the fixtures of a module; xdist 3.8 ignores its groups under pytest 9.2.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test: env
	$(PYTEST) -m 'not slow'

test-all: env
	$(PYTEST)

# --- the environment: .torch (the venv and torch), .installed (the package), .lint (the linters) are stamps

env: $(VENV)/.installed

# The torch of PYTHON is borrowed where there is one. A venv sees the packages of the Python below it, but not those of
# another venv: if PYTHON is one, a .pth file adds its packages.
HAS_TORCH := import re, sys; from importlib.metadata import version; \
  sys.exit(tuple(map(int, re.findall(r"\d+", version("torch"))[:2])) < (2, 11))
SITE_OF_TORCH := from importlib.metadata import distribution; print(distribution("torch").locate_file(""))

$(VENV)/.torch:
	@rm -rf $(VENV)
	@if $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null; then \
	  echo 'Making $(VENV), with the torch of $(PYTHON)'; set -e; \
	  $(PYTHON) -m venv --system-site-packages $(VENV); \
	  site=$$($(PYTHON) -c '$(SITE_OF_TORCH)'); \
	  $(BIN)/python -c '$(HAS_TORCH)' 2>/dev/null || \
	    echo "$$site" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"; \
	else \
	  echo 'Making $(VENV), with $(TORCH)'; set -e; \
	  $(PYTHON) -m venv $(VENV); \
	  $(PIP) install $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)') '$(TORCH)'; \
	fi
	@touch $@

# A changed setting of the build has to build again, as a changed source does.
SETTINGS := $(CXX)|$(CUDA_HOME)|$(VISION_OPS_BUILD)|$(VISION_OPS_CUDA_ARCHS)|$(VISION_OPS_DEBUG)|$(VISION_OPS_SANITIZE)
$(VENV)/.settings: settings | $(VENV)/.torch
	@echo '$(SETTINGS)' | cmp -s - $@ || echo '$(SETTINGS)' > $@

# The constraint holds torch where it is: pip may fail, but not replace it. Nor do timm and torchvision, with which tests
# compare, bring another one. Without CUDA, torch brings no Triton; the tests then run the Triton kernels in its
# interpreter, and that of 3.6.0 needs numpy < 2.4.
SHOW_BUILT := import json; info = json.load(open("vision_ops/_build_info.json")); \
  [print(part.upper(), "kernels:", info[part]["reason"] or "built.") for part in ("cpu", "cuda")]; \
  print("Compiled in", info["seconds"], "s")
IN_CPU_TORCH := import sys, torch; sys.exit(bool(torch.version.cuda or torch.version.hip))
$(VENV)/.installed: $(VENV)/.torch $(VENV)/.settings setup.py pyproject.toml $(shell find csrc)
	@echo 'Installing vision_ops and compiling its kernels'
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/constraint
	@$(PIP) install -c $(VENV)/constraint -e '.[bench,test]'
	@if $(BIN)/python -c '$(IN_CPU_TORCH)'; then \
	  $(PIP) install 'triton==3.6.0; sys_platform == "linux"' 'numpy<2.4'; fi
	@$(PIP) install --no-deps 'timm==1.0.31' 'torchvision>=0.26'
	@$(BIN)/python -c '$(SHOW_BUILT)'
	@touch $@

# --- style

$(VENV)/.lint: $(VENV)/.installed pyproject.toml
	@$(PIP) install -c $(VENV)/constraint -e '.[dev]'
	@touch $@

CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror --ferror-limit=1 $(CXX_FILES)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# --- documentation

$(VENV)/.docs: $(VENV)/.installed pyproject.toml
	@$(PIP) install -c $(VENV)/constraint -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean:
	rm -rf build dist *.egg-info .editable vision_ops/kernels vision_ops/*.so vision_ops/_build_info.json $(VENV)/.installed
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
