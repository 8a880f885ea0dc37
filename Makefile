# Everything happens in .venv, which `make setup` builds once and brings up to date when a list of packages changes.

PYTHON ?= python3
# The one torch is installed only where .venv has none: an open range lets the newest torch bring gigabytes of CUDA.
TORCH ?= torch==2.13.0
WORKERS ?= 2

VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/ready

.DEFAULT_GOAL := help
.PHONY: help setup compare test slow lint format bench readme docs clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## Build .venv from nothing: torch, regard with its tools, the peers to compare with

compare: $(READY) ## Train and time attention on this machine: compare/report.html says which to use
	$(VENV)/bin/regard compare

test: $(READY) ## Run every test but the slow ones
	$(RUN) -m pytest -n $(WORKERS) -m "not slow"

slow: $(READY) ## Run the slow tests
	$(RUN) -m pytest -n $(WORKERS) -m slow

lint: $(READY) ## Check style, format and types
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m pyright

format: $(READY) ## Put imports and layout in order
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

bench: $(READY) ## Run every script of benchmarks/ and bring the README's speed table up to date
	@set -e; for script in $(filter-out benchmarks/harness.py,$(sort $(wildcard benchmarks/*.py))); do \
		echo "== $$script"; $(RUN) $$script; \
	done
	$(RUN) tools/readme.py

readme: $(READY) ## Rewrite the tables in README.md
	$(RUN) tools/readme.py

# Not --quiet, under which MkDocs forgets the warnings that --strict should fail for.
docs: $(READY) ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

clean: ## Remove .venv and everything else that can be built again
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(READY): pyproject.toml requirements-peers.txt requirements-vision.txt
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(RUN) -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))' || $(RUN) -m pip install "$(TORCH)"
	$(RUN) -m pip install --quiet --editable ".[compare,dev,docs]"
	$(RUN) -m pip install --quiet --no-deps --requirement requirements-peers.txt
	$(RUN) -m pip install --quiet --no-deps --upgrade --target $(VENV)/vision --requirement requirements-vision.txt
	touch $@
