# `make demo` and `make test` work on a fresh clone: they create .venv, install into it, and run.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
NEWEST := .venv-newest
# Quantisation libraries, for the tests of quantised bases only: PEFT imports them whenever it can, and they print to
# stderr and take seconds
QUANTIZATION := .venv/quantization
# DeepSpeed, for the tests that launch it only: where it can be imported, Accelerate, PEFT and TRL do so, which takes
# seconds
DEEPSPEED := .venv/deepspeed

.PHONY: env demo test test-all quality conformance conformance-fast conformance-newest clean

env: $(STAMP)

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,eval]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps \
		--target $(QUANTIZATION) bitsandbytes torchao
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps \
		--target $(DEEPSPEED) deepspeed einops hjson msgpack ninja py-cpuinfo
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python recipes/offline/demo.py --output_dir out/demo

PYTEST := PYTHONPATH=$(QUANTIZATION) DEEPSPEED_FOLDER=$(abspath $(DEEPSPEED)) $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(STAMP)
	$(PYTEST)

# what is marked as slow, too: it repeats with more methods, adapters and engines what `make test` tests with some
test-all: $(STAMP)
	$(PYTEST) -m "not gpu"

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# PEFT's own tests against SclConfig, see docs/conformance.md
conformance: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m conformance -n 2

conformance-fast: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m conformance --fast

# the same with the newest releases that setup.py allows, of everything but torch
conformance-newest:
	$(PYTHON) -m venv $(NEWEST)
	grep '^torch==' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
		--constraint $(NEWEST)/constraints.txt --editable . pytest pytest-xdist setuptools
	PYTHONPATH=tests $(NEWEST)/bin/python -m conformance -n 2

clean:
	rm -rf .venv $(NEWEST) .conformance out .pytest_cache .mypy_cache .ruff_cache .hypothesis
