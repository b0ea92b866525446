# Two commands do everything, each installing what it needs:
#   make demo    the main job, small: real text, training, resume, evaluation, generated text
#   make test    all tests that need no GPU
SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python
PYTEST := $(PYTHON) -m pytest

.DEFAULT_GOAL := help
.PHONY: help env demo test test-quick test-gpu lint format docs docs-serve doctor clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

env: $(VENV)/.installed ## the environment in .venv (Python 3.12, torch, megatron-core, ...)

$(VENV)/.installed: pyproject.toml constraints.txt tools/make_env.sh
	tools/make_env.sh $(VENV)
	touch $@

demo: env ## train a small YOCO on real text, CPU is enough; about five minutes; result in runs/demo
	launch/demo.sh runs/demo

# Three workers, as some tests wait; the longest files first, as tests/conftest.py orders them.
test: env ## every test that needs no GPU
	$(PYTEST) -n 3 --dist loadfile --no-loadscope-reorder

test-quick: env ## the tests that take seconds
	$(PYTEST) -n 3 --dist loadfile --no-loadscope-reorder -m "not slow"

test-gpu: ## GPU tests, with the Python that has torch, Transformer Engine and pytest-xdist (PYTHON=python3 make test-gpu)
	$(PYTEST) -rs -v -n 8 --dist loadgroup tests/gpu

lint: env ## style and format (ruff), the order of the rooms (import-linter), types (mypy)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy

format: env ## ruff: apply
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: env ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

docs-serve: env ## the site at http://127.0.0.1:8000, anew whenever a page changes
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs serve

doctor: env ## what is installed here, and what each part will use
	$(PYTHON) tools/doctor.py

clean: ## remove caches and runs, not the environment
	rm -rf runs build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache $$(find . -name __pycache__ -not -path './$(VENV)/*')
