# Every target sets up what it needs; a second call does not install again.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin

.PHONY: help quickstart wiki test test-all lint format clean

help: ## What can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: .venv/ready ## A small policy learns to search a generated world (minutes, CPU)
	$(BIN)/r1s train tiny_world $(ARGS)

wiki: .venv/ready ## SmolLM2-135M over Wikipedia summaries: five RL steps (CPU)
	$(BIN)/r1s train wiki_smollm2 $(ARGS)

test: .venv/ready ## The tests, without the slow ones
	$(BIN)/pytest -m "not slow and not gpu" $(ARGS)

test-all: .venv/ready ## All tests that need no GPU
	$(BIN)/pytest -m "not gpu" $(ARGS)

lint: .venv/ready ## Format and lint checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: .venv/ready ## Format in place
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove the virtual environment
	rm -rf .venv

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
