# Every target makes the virtual environment first, or reuses it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM = false

.PHONY: help test lint demo clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing flatlora-optim and what its tests and examples need into $(VENV) (a few minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@# torch first, so that nothing below resolves to another build of it
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

test: $(VENV)/.installed  ## Run the test suite
	@echo "Running the tests"
	@$(BIN)/python -m pytest

lint: $(VENV)/.installed  ## Check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

demo: $(VENV)/.installed  ## Fine-tune MiniLM on movie reviews, with and without Flat-LoRA
	@$(BIN)/python examples/sentiment.py

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
