# Everything from a clean checkout needs Python 3.10 to 3.13, a C++17 compiler and make; `make help` lists the verbs.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
FAMILY ?= norm

BIN := $(VENV)/bin
BUILD := build/$(notdir $(abspath $(VENV)))
CXX_SOURCES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cuh' 'csrc/*.cu')
# One compiler job per core, and 3 GB of free memory for each.
JOBS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); \
  memory=$$(awk '/MemAvailable/ {print int($$2 / 3000000)}' /proc/meminfo 2>/dev/null || echo $$cores); \
  jobs=$$((memory < cores ? memory : cores)); echo $$((jobs > 1 ? jobs : 1)))

# cmake, ninja and the linters come from the environment.
export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup build test test-cuda demo bench lint format sanitize wheel clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12  the interpreter that makes the environment"
	@echo "  VENV=path          the environment; one that exists already keeps its torch"
	@echo "  ARGS='...'         passed on to pytest, the demo or the benchmark"
	@echo "  FAMILY=norm        what \`make bench\` measures"
	@echo "  JOBS=n             compiler jobs at once (here $(JOBS))"
	@echo "  CMAKE_ARGS='...'   such as -DINLAY_CUDA=OFF or '-DINLAY_CUDA_ARCHITECTURES=80-real;90a-real'"

setup: build ## environment, pinned dependencies, native build, editable install

test: build ## every test; those that need a GPU skip without one
	$(BIN)/python -m pytest $(ARGS)

test-cuda: build ## the tests that need a GPU, and nothing else
	@$(require_gpu)
	$(BIN)/python -m pytest -m cuda $(ARGS)

demo: build ## train and generate with a Hugging Face model, unpatched and patched
	$(BIN)/inlay demo $(ARGS)

bench: build ## measure one op family against its rivals
	$(BIN)/python benchmarks/run.py $(FAMILY) $(ARGS)

lint: $(VENV)/.inlay-requirements ## ruff, clang-format, mypy: complain
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(CXX_SOURCES)
	mypy

format: $(VENV)/.inlay-requirements ## ruff, clang-format: mend
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_SOURCES)

# torch's caching allocator hides out-of-bounds accesses from memcheck, hence the variable. racecheck does not know that
# a lane which arrives at an mbarrier behind __syncwarp() speaks for its warp (a program of two warps and one buffer is
# reported; it is not if all lanes arrive), so it says nothing about kernels built on that: attention's and gdn's.
# synccheck calls threads divergent where two warpgroups meet at a numbered barrier from different places: attention's.
sanitize: build ## every CUDA kernel under compute-sanitizer: memcheck, racecheck, synccheck
	@$(require_gpu)
	@command -v compute-sanitizer >/dev/null || { echo "inlay: compute-sanitizer is not on PATH; it is part of the CUDA toolkit"; exit 1; }
	for family in tests/*/sanitized.py; do for tool in memcheck synccheck "racecheck bfloat16"; do set -- $$tool; \
	  case $$1-$$family in racecheck-*/attention/* | synccheck-*/attention/* | racecheck-*/gdn/*) continue;; esac; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$1 --error-exitcode 1 --kernel-name kns=inlay \
	    $(BIN)/python -m tests.$$(basename $$(dirname $$family)).sanitized $$2 || exit 1; \
	done; done

wheel: build ## a wheel in dist/
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

clean: ## remove what was built; the environment stays
	rm -rf build dist python/inlay/lib python/inlay/_native*.so
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

build: $(BUILD)/build.ninja $(BUILD)/.installed ## native libraries, into python/inlay; quick when nothing changed
	@start=$$(date +%s); cmake --build $(BUILD) --parallel $(JOBS) && \
	  echo "inlay: native build took $$(($$(date +%s) - start)) s with $(JOBS) jobs"

# CMake reruns itself when its files change; this rule is for the first time, and for a changed environment.
$(BUILD)/build.ninja: $(VENV)/.inlay-requirements
	cmake -S . -B $(BUILD) -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN)/python) $(CMAKE_ARGS)
	@touch $@

# Python files and the `inlay` command only: the libraries are built beside them, by the rules above.
$(BUILD)/.installed: pyproject.toml $(VENV)/.inlay-requirements
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --config-settings wheel.cmake=false --editable .
	@mkdir -p $(BUILD) && touch $@

# Our own environment is pinned. One that was there before is its owner's: it gets what it lacks and keeps its torch.
ifneq ($(and $(wildcard $(BIN)/python),$(if $(wildcard $(VENV)/.inlay-owned),,foreign)),)
$(VENV)/.inlay-requirements: requirements.in
	@mkdir -p $(BUILD)
	@$(BIN)/python -c 'import torch; print(f"torch=={torch.__version__}")' > $(BUILD)/torch.txt 2>/dev/null || \
	  { echo "inlay: $(VENV) has no torch; install torch 2.11 or later there, or leave VENV to make"; exit 1; }
	@echo "inlay: installing what $(VENV) lacks; it keeps its $$(cat $(BUILD)/torch.txt)"
	@$(BIN)/python -m pip install --quiet --constraint $(BUILD)/torch.txt --requirement requirements.in
	@touch $@
else
$(VENV)/.inlay-requirements: requirements.in requirements.lock
	@echo "inlay: installing pinned dependencies into $(VENV)"
	@mkdir -p $(VENV) && touch $(VENV)/.inlay-owned
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet $$(grep ^torch== requirements.lock)
	@$(BIN)/python -m pip install --quiet --requirement $$($(BIN)/python -c \
	  'import sys; print("requirements.lock" if sys.version_info >= (3, 11) else "requirements.in")')
	@touch $@
endif

define require_gpu
$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
  { echo "inlay: make $@ needs an NVIDIA GPU and a CUDA build of torch; none is usable here"; exit 1; }
endef
