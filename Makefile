# `make demo` and `make test` need python3 (3.11 or newer) and make, nothing else: they set up $(VENV) by themselves.
PYTHON ?= python3
VENV ?= .venv
DATA ?= runs/data
DEMO_ARGS ?=
FUZZ_ARGS ?= --cases 2000
NOTEBOOK_ARGS ?=
SLOW_ARGS ?=
MUTANT_ARGS ?= --count 100 --seed 0
DOCS ?= build/docs
BIN := $(VENV)/bin
PYTEST := python -m pytest -n auto --maxprocesses 4 --dist worksteal
READY := $(VENV)/.ready
PEERS_VENV ?= .venv-peers
OLDEST_VENV ?= .venv-oldest
OLDEST_TESTS ?= $(patsubst %,tests/test_%.py,against_optax axis_name checks cifar10 linear linear_plan numbers package probs readme serialization sharding)

# The packages here compile for CPU; a machine with an accelerator may say otherwise.
export JAX_PLATFORMS ?= cpu
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: demo data test test-slow test-oldest fuzz peers mutants lint release-check bench docs notebooks clean

demo: $(READY) data  ## train a convolutional network on CIFAR-10 with jaxce's loss
	$(BIN)/python -m jaxce.examples.cifar10 --data-dir $(DATA) --output-dir runs/demo $(DEMO_ARGS)

data: $(READY)
	@if [ -f ../shared/cifar10/unpack.py ] && [ ! -d $(DATA)/cifar-10-batches-bin ]; then \
		$(BIN)/python ../shared/cifar10/unpack.py $(DATA); fi

test: $(READY)  ## every module, doctests and README examples included, one case in eight of what has many (minutes)
	$(BIN)/$(PYTEST) -m "not slow"

test-slow: $(READY)  ## what that leaves out: the other cases, random ones, programs for TPU (half an hour)
	$(BIN)/$(PYTEST) -m slow $(SLOW_ARGS)

test-oldest: $(OLDEST_VENV)/.ready  ## the numbers, with the oldest version of every package that pyproject.toml allows (minutes)
	$(OLDEST_VENV)/bin/$(PYTEST) -m "not slow and not aot" $(OLDEST_TESTS)

fuzz: $(READY)  ## random cases of every loss against float64; FUZZ_ARGS="--seed 7 --cases 500" for others
	$(BIN)/python -m tests.sweep $(FUZZ_ARGS)

mutants: $(READY)  ## whether the tests notice small changes to jaxce, a sample of them (hours)
	$(BIN)/python tests/mutants.py $(MUTANT_ARGS)

peers: $(PEERS_VENV)/.ready  ## optax's, Keras's and torch's own tests of softmax cross-entropy, on jaxce
	$(PEERS_VENV)/bin/python tests/peers

lint: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

release-check: $(READY)  ## build a release, install it where nothing else is, run its tests from its sources (minutes)
	$(BIN)/python tests/release.py

bench: $(READY)  ## the figures and plots of README and docs (30 minutes on 2 idle cores)
	$(BIN)/python -m benchmarks dense
	$(BIN)/python -m benchmarks linear
	$(BIN)/python -m benchmarks sharded

docs: $(READY)  ## the documentation as HTML, in build/docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs $(DOCS)

notebooks: $(READY) data  ## run the notebooks from the top and keep their outputs
	JAXCE_DATA_DIR=$(abspath $(DATA)) $(BIN)/python notebooks/execute.py $(NOTEBOOK_ARGS)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test,bench,docs,notebooks,release]"
	@touch $@

$(PEERS_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(PEERS_VENV)/bin/python -m pip install --quiet --editable ".[peers]"
	@touch $@

$(OLDEST_VENV)/.ready: pyproject.toml tests/oldest.py
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST_VENV)/bin/python tests/oldest.py > $(OLDEST_VENV)/oldest.txt
	$(OLDEST_VENV)/bin/python -m pip install --quiet --requirement $(OLDEST_VENV)/oldest.txt --editable .
	@touch $@

clean:
	rm -rf .venv* .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist runs
