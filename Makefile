# Every target sets up what it needs; a second call does not install again.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help quickstart wiki test test-aot fuzz test-all lint format docs dist clean

help: ## What can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: .venv/ready ## A small policy learns to search a generated world (minutes, CPU)
	$(BIN)/r1s train tiny_world $(ARGS)

wiki: .venv/ready ## SmolLM2-135M learns to search Wikipedia summaries (20 to 25 minutes, CPU)
	$(BIN)/r1s train wiki_smollm2 $(ARGS)

test: .venv/dev ## The tests, without the slow ones
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu and not aot" $(ARGS)

test-aot: .venv/aot ## Compile every kernel for TPUs (and H100, with its compilers installed)
	$(BIN)/pytest -n 2 -m "aot and not slow" $(ARGS)

fuzz: .venv/dev ## Damage everything that is read, 10,000 times
	$(BIN)/python -m tests.fuzz --inputs 10000 $(ARGS)

test-all: .venv/dev .venv/aot ## All tests that need no GPU
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu" $(ARGS)

lint: .venv/dev ## Format, lint and type checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

format: .venv/dev ## Format in place
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/publish ## Build the site in docs/_build; a broken link or reference fails
	$(BIN)/sphinx-build -q -W --keep-going -E docs docs/_build $(ARGS)

dist: .venv/publish ## Build sdist and wheel in dist/ and check their metadata
	rm -rf dist
	$(BIN)/python -m build --quiet --outdir dist .
	$(BIN)/twine check --strict dist/*

clean: ## Remove the virtual environment
	rm -rf .venv

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) -e .
	touch $@

.venv/dev: .venv/ready
	$(INSTALL) -e ".[dev]"
	touch $@

.venv/publish: .venv/dev
	$(INSTALL) -e ".[dev,publish]"
	touch $@

.venv/aot: .venv/dev
	$(INSTALL) -e ".[dev,aot]"
	touch $@
