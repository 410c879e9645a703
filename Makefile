# `make demo` and `make test` work on a fresh clone: they create .venv, install into it, and run.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: env demo test quality clean

env: $(STAMP)

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,eval]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python recipes/offline/demo.py --output_dir out/demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv out .pytest_cache .mypy_cache .ruff_cache .hypothesis
