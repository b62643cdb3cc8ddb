# Every target makes the virtual environment that it needs first, or reuses it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
export TOKENIZERS_PARALLELISM = false

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

# The core: what needs torch, PEFT and bitsandbytes alone.
tests = $(patsubst %,tests/test_%.py,$(1))
CORE_TESTS := $(call tests,bad_input checkpoint docstrings exactness experts extending kernels landscape layout lifetime \
	misuse native noise nothing_silent observers optimizer quantized register schedules state_machine styles table targets virtual)
FAST_TESTS := $(filter-out $(call tests,docstrings landscape native),$(CORE_TESTS)) # those compile C, or measure much

.PHONY: help demo demo-readme qlora test test-fast explore test-triton coverage test-oldest test-pythons test-trainers \
	test-zoo lint hooks docs package bench gpu study clean

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
	@$(PIP) --editable . --group demo
	@touch $@

$(VENV)/.examples: $(VENV)/.made pyproject.toml
	@echo "Installing flatlora-optim and what its examples need into $(VENV) (once)"
	@$(PIP) --editable . --group examples
	@touch $@ $(VENV)/.demo

$(VENV)/.dev: $(VENV)/.made pyproject.toml
	@echo "Installing flatlora-optim and what its tests and examples need into $(VENV) (a few minutes, once)"
	@$(PIP) --editable . --group dev
	@touch $@ $(VENV)/.demo $(VENV)/.examples

demo: $(VENV)/.demo  ## Compare LoRA, Flat-LoRA and SAM on digits, ten seeds each (a few minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python examples/compare.py

demo-readme: $(VENV)/.demo  ## The same, and write its table and pictures into README and docs
	@OMP_NUM_THREADS=1 $(BIN)/python examples/compare.py --write-readme

qlora: $(VENV)/.examples  ## Fine-tune a 4-bit SmolLM2 on arithmetic, with and without Flat-LoRA
	@$(BIN)/python examples/qlora.py

test: $(VENV)/.dev  ## Run the test suite (about 8 minutes on 2 cores)
	@echo "Running all tests, one process per core: about 8 minutes on 2 cores (make test-fast: 90 seconds)"
	@$(PYTEST)

test-fast: $(VENV)/.dev  ## Run the tests of the core (under 90 seconds on 2 cores)
	@$(PYTEST) --quiet $(FAST_TESTS)

BUDGET ?= 120
explore: $(VENV)/.dev  ## Run the property tests with fresh random seeds, for BUDGET=120 seconds
	@OMP_NUM_THREADS=1 $(BIN)/python tools/explore.py $(BUDGET)

TRITON_TESTS := $(patsubst %,tests/test_%.py,kernels misuse observers styles state_machine quantized) \
	tests/distributed/test_sharding.py \
	$(patsubst %,tests/test_exactness.py::test_%,real_adapter_layers_come_back the_sum_is_rounded_once_from_float32_or_wider \
	rows_that_are_not_finite_get_no_noise_and_the_others_do a_snapshot_fits_a_weight_that_was_cast_between_steps)

test-triton: $(VENV)/.dev  ## Run the tests of the GPU's kernels, and those around them, by Triton's interpreter
	@TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto $(TRITON_TESTS) \
		--deselect tests/test_observers.py::test_saving_a_weight_of_several_parts_sees_it_clean

# A signal that comes while coverage holds its own lock would stop the run for good.
coverage: $(VENV)/.dev  ## Run the test suite and show which lines and branches it misses
	@$(PYTEST) \
		--cov --cov-report=term-missing:skip-covered --deselect tests/trust/test_faults.py::test_a_signal_at_any_time

OLDEST ?= .venv-oldest
$(OLDEST)/.made: constraints-oldest.txt pyproject.toml
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@echo "Installing the oldest supported releases into $(OLDEST) (several GB, once)"
	@$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	@$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt \
		--editable . --group core
	@touch $@

test-oldest: $(OLDEST)/.made  ## Run the core tests with the oldest supported releases
	@OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest --numprocesses auto --dist loadfile $(CORE_TESTS)

ZOO ?= .venv-zoo
$(ZOO)/.made: constraints-zoo.txt
	@test -x $(ZOO)/bin/python || $(PYTHON) -m venv $(ZOO)
	@echo "Installing LoRA libraries that need old releases of others into $(ZOO) (several GB, once)"
	@$(ZOO)/bin/python -m pip install --quiet --upgrade pip
	@$(ZOO)/bin/python -m pip install --quiet --constraint constraints-zoo.txt torch
	@$(ZOO)/bin/python -m pip install --quiet --constraint constraints-zoo.txt --requirement constraints-zoo.txt \
		--editable .
	@# unsloth asks for xformers, which asks for a torch with CUDA. It does without both.
	@$(ZOO)/bin/python -m pip install --quiet --no-deps unsloth==2026.10.9 unsloth_zoo==2026.10.9
	@touch $@

test-zoo: $(ZOO)/.made  ## Meet loralib, LitGPT, torchtune, AdapterHub, LyCORIS, timm, Keras and unsloth themselves
	@for name in zoo unsloth; do \
		OMP_NUM_THREADS=1 $(ZOO)/bin/python -m pytest --confcutdir=tests/zoo tests/zoo/test_$$name.py || exit 1; \
	done

TRAINERS ?= axolotl composer llama_factory swift torchtune
.venv-trainers/%/.made: tests/trainers/%.txt
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@echo "Installing what the tests of $* need into $(@D) (several GB, once)"
	@$(@D)/bin/python -m pip install --quiet --upgrade pip
	@$(@D)/bin/python -m pip install --quiet --requirement $< --editable '.[peft]' hypothesis pytest pytest-timeout
	@# What asks for an older torch, or for more of it, than there is for CPUs: without what it asks for
	@if test -e $(<:.txt=-alone.txt); then \
		$(@D)/bin/python -m pip install --quiet --no-deps --requirement $(<:.txt=-alone.txt); \
	fi
	@touch $@

test-trainers: $(TRAINERS:%=.venv-trainers/%/.made)  ## Run the plug-ins in the trainers themselves (or TRAINERS=...)
	@for name in $(TRAINERS); do \
		OMP_NUM_THREADS=1 .venv-trainers/$$name/bin/python -m pytest --timeout 900 --confcutdir tests/trainers tests/trainers/test_$$name.py || exit 1; \
	done

test-pythons:  ## Run the core tests with each Python from 3.10 to 3.13 that is here (or PYTHONS=...)
	@$(PYTHON) tools/pythons.py $(PYTHONS) $(CORE_TESTS)

LINTERS ?= .venv-lint
$(LINTERS)/.made: constraints.txt pyproject.toml
	@test -x $(LINTERS)/bin/python || $(PYTHON) -m venv $(LINTERS)
	@echo "Installing ruff, mypy and torch, for its types, into $(LINTERS) (once)"
	@$(LINTERS)/bin/python -m pip install --quiet --upgrade pip
	@$(LINTERS)/bin/python -m pip install --quiet --constraint constraints.txt --group lint
	@# mypy reads torch's sources and runs nothing: what torch depends on is not needed
	@$(LINTERS)/bin/python -m pip install --quiet --constraint constraints.txt --no-deps torch
	@touch $@

lint: $(LINTERS)/.made  ## Check style and types
	@$(LINTERS)/bin/ruff check .
	@$(LINTERS)/bin/ruff format --check .
	@$(LINTERS)/bin/mypy

hooks: $(LINTERS)/.made  ## Have git check style and types before each commit
	@$(LINTERS)/bin/python -m pip install --quiet pre-commit
	@$(LINTERS)/bin/pre-commit install

docs: $(VENV)/.dev  ## Build the documentation into site/; warnings are errors
	@$(BIN)/python -m sphinx -E -W --keep-going -q -b html docs site

package: $(VENV)/.made  ## Build sdist and wheel into dist/, and try the wheel with torch alone (ADDRESS=... of the repository)
	@$(PIP) build twine
	@$(BIN)/python tools/package.py $(ADDRESS) $(REVISION)

bench: $(VENV)/.dev  ## Measure speed, memory and drift; writes benchmarks/RESULTS.md (under 15 minutes)
	@$(BIN)/python benchmarks/run.py

gpu:  ## Measure and test on a GPU, with the Python that is there; writes benchmarks/RESULTS-GPU.md (under 8 minutes)
	@$(PYTHON) benchmarks/gpu.py

study: $(VENV)/.dev  ## Run or resume the study in benchmarks/GENERALIZATION.md (hours)
	@$(BIN)/python benchmarks/generalization.py

clean:  ## Remove the virtual environments and caches
	rm -rf $(VENV) $(OLDEST) $(ZOO) .venv-trainers $(LINTERS) .venv-3.* dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
