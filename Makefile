# Every target makes the virtual environment that it needs first, or reuses it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
export TOKENIZERS_PARALLELISM = false

.PHONY: help demo qlora test test-triton coverage test-oldest lint docs bench gpu generalization clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

$(VENV)/.made: constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch into $(VENV) (once)"
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@# torch first, so that nothing below resolves to another build of it
	@$(PIP) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.made pyproject.toml
	@echo "Installing flatlora-optim and what its demo needs into $(VENV) (once)"
	@$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.examples: $(VENV)/.made pyproject.toml
	@echo "Installing flatlora-optim and what its examples need into $(VENV) (once)"
	@$(PIP) --editable '.[examples]'
	@touch $@ $(VENV)/.demo

$(VENV)/.dev: $(VENV)/.made pyproject.toml
	@echo "Installing flatlora-optim and what its tests and examples need into $(VENV) (a few minutes, once)"
	@$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.demo $(VENV)/.examples

demo: $(VENV)/.demo  ## Fine-tune MiniLM on movie reviews, with and without Flat-LoRA (some minutes)
	@$(BIN)/python examples/sentiment.py

qlora: $(VENV)/.examples  ## Fine-tune a 4-bit SmolLM2 on arithmetic, with and without Flat-LoRA
	@$(BIN)/python examples/qlora.py

test: $(VENV)/.dev  ## Run the test suite
	@echo "Running the tests, one process per core"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

TRITON_TESTS := $(patsubst %,tests/test_%.py,kernels misuse observers styles state_machine exactness quantized)

test-triton: $(VENV)/.dev  ## Run the tests of the GPU's kernels, and those around them, by Triton's interpreter
	@TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto $(TRITON_TESTS) \
		--deselect tests/test_observers.py::test_saving_a_weight_of_several_parts_sees_it_clean

# A signal that comes while coverage holds its own lock would stop the run for good.
coverage: $(VENV)/.dev  ## Run the test suite and show which lines and branches it misses
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile \
		--cov --cov-report=term-missing:skip-covered --deselect tests/trust/test_faults.py::test_a_signal_at_any_time

OLDEST ?= .venv-oldest
OLDEST_TESTS := $(patsubst %,tests/test_%.py,styles optimizer observers misuse lifetime state_machine exactness \
	noise targets checkpoint bad_input virtual quantized schedules landscape kernels native table docstrings)

$(OLDEST)/.made: constraints-oldest.txt pyproject.toml
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@echo "Installing the oldest supported releases into $(OLDEST) (several GB, once)"
	@$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	@$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[qlora]' \
		hypothesis pytest pytest-timeout pytest-xdist scipy
	@touch $@

test-oldest: $(OLDEST)/.made  ## Run the core tests with the oldest supported releases
	@OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest --numprocesses auto --dist loadfile $(OLDEST_TESTS)

lint: $(VENV)/.dev  ## Check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(VENV)/.dev  ## Build the documentation into site/; warnings are errors
	@$(BIN)/python -m sphinx -E -W --keep-going -q -b html docs site

bench: $(VENV)/.dev  ## Measure speed, memory and drift; writes benchmarks/RESULTS.md (under 15 minutes)
	@$(BIN)/python benchmarks/run.py

gpu:  ## Measure and test on a GPU, with the Python that is there; writes benchmarks/RESULTS-GPU.md (under 8 minutes)
	@$(PYTHON) benchmarks/gpu.py

generalization: $(VENV)/.dev  ## Run or resume the study in benchmarks/GENERALIZATION.md (hours)
	@$(BIN)/python benchmarks/generalization.py

clean:  ## Remove the virtual environments and caches
	rm -rf $(VENV) $(OLDEST) site .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
