# `make demo` and `make test` need nothing but git, make and Python 3.10 to 3.13: each builds .venv first if it is not there.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
STAMP   = $(VENV)/.installed
LIGER   = $(VENV)/.liger
DOCS    = $(VENV)/.docs
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check

HARNESS = lm_eval sacrebleu portalocker tabulate colorama lxml requests charset-normalizer certifi urllib3

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help install demo test test-all test-oldest test-newest test-deepspeed models notebooks docs dist lint format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## .venv with the tested versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 10) <= v[:2] <= (3, 13) else \
		"fusedalign is tested on Python 3.10 to 3.13, $(PYTHON) is %d.%d: choose one with make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	@# TRL asks for Python 3.11, but what is used of it here runs on 3.10: the tests of that version are the proof.
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		$(PIP) -c constraints.txt -e '.[trl,notebooks,dev]'; \
	else \
		$(PIP) -c constraints.txt -e '.[transformers,notebooks,dev]' && \
		$(PIP) --no-deps --ignore-requires-python -c constraints.txt trl; \
	fi
	@# Of the harness' packages the tests need these alone; all of them take minutes.
	$(PIP) --no-deps -c constraints.txt $(HARNESS)
	@touch $@

demo: $(STAMP)  ## SFT, then DPO with stock TRL and with fusedalign: one table and one picture
	$(BIN)/fusedalign demo

# A file runs on one worker, which makes its fixtures (two ranks, trained models) once.
PYTEST = $(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist loadfile

test: $(STAMP)  ## what CI runs
	$(PYTEST) -m 'not slow'

test-all: $(LIGER)  ## the slow tests too, with Liger Kernel for docs/models.md
	$(PYTEST)

models: $(LIGER)  ## docs/models.md: what works with each family of models
	$(BIN)/python tests/packing/models_page.py > $(VENV)/models.md
	mv $(VENV)/models.md docs/models.md

$(LIGER): $(STAMP)
	$(PIP) --no-deps -c constraints.txt liger-kernel
	@touch $@

OLDEST = .venv-oldest
test-oldest: $(OLDEST)/.installed  ## the TRL suite against the oldest TRL that is supported, in a .venv-oldest of its own
	$(OLDEST)/bin/python -m pytest -q -m 'not slow' tests/trl tests/losses/test_trl_parity.py

$(OLDEST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -v '^trl==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt \
		-e '.[trl,dev]' 'trl==1.15.0'
	@touch $@

NEWEST = .venv-newest
NEWEST_VERSIONS = torch==2.14.1 transformers==5.24.0
test-newest: $(NEWEST)/.installed  ## the same against newer versions than those of constraints.txt, in a .venv-newest
	$(NEWEST)/bin/python -m pytest -q -m 'not slow' tests/trl tests/losses/test_trl_parity.py

$(NEWEST)/.installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(NEWEST)
	grep -v -E '^(torch|transformers)==' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(NEWEST)/constraints.txt \
		-e '.[trl,dev]' $(NEWEST_VERSIONS)
	@touch $@

DEEPSPEED = .venv-deepspeed
test-deepspeed: $(DEEPSPEED)/.installed  ## the tests of DeepSpeed's ZeRO, in a .venv-deepspeed of its own
	DS_ACCELERATOR=cpu $(DEEPSPEED)/bin/python -m pytest -q tests/trl/test_engines_zero.py

$(DEEPSPEED)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEEPSPEED)
	$(DEEPSPEED)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[trl,dev]' \
		setuptools
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(DEEPSPEED)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt --no-build-isolation deepspeed
	@touch $@

lint: $(STAMP)  ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DOCS)  ## the documentation site in site/; a page without a place in it or a dead link is an error
	@# Without --quiet, which would hide warnings from --strict.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(DOCS): $(STAMP)
	$(PIP) -c constraints.txt -e '.[docs]'
	@touch $@

format: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(STAMP)  ## execute the notebooks and store their outputs
	$(BIN)/python notebooks/execute.py

dist: $(STAMP)  ## the wheel and the source distribution in dist/, checked for the package index
	$(PIP) -c constraints.txt build twine
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*

clean:  ## remove the environments, runs/ and caches
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(DEEPSPEED) runs .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist site
