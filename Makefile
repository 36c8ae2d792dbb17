# Every target sets up .venv on a fresh machine and then runs.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test slow matrix soak killed gpu lint docs dist clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest -q -n 2

slow: $(READY)
	$(BIN)/python -m pytest -q -n 2 -m slow

matrix: $(READY)
	$(BIN)/python -m tests.matrix
	$(BIN)/python -m tests.families

soak: $(READY)
	$(BIN)/python -m tests.soak

killed: $(READY)
	$(BIN)/python -m tests.killed --solver mat freelb textat smart

gpu: $(READY)
	$(BIN)/python -m tests.gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(READY)
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build
	@echo "open docs/_build/index.html"

dist: $(READY)
	$(BIN)/pip install -q build twine
	rm -rf dist build
	$(BIN)/python -m build -q
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv build/bare
	build/bare/bin/pip install -q -c constraints.txt dist/*.whl
	cd build && bare/bin/python ../examples/quickstart.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/pip uninstall -q -y data-science-types  # of smart-pytorch: old stubs hide numpy's types
	touch $(READY)

clean:
	rm -rf .venv runs dist build docs/_build .pytest_cache .ruff_cache .hypothesis
