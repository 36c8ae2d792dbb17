# `make demo` and `make test` set up .venv on a fresh machine and then run.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test slow matrix lint clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest -q -n 2

slow: $(READY)
	$(BIN)/python -m pytest -q -n 2 -m slow

matrix: $(READY)
	$(BIN)/python -m tests.matrix
	$(BIN)/python -m tests.families

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright --pythonpath $(BIN)/python

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/pip uninstall -q -y data-science-types  # of smart-pytorch: old stubs hide numpy's types
	touch $(READY)

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache .hypothesis
