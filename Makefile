# Two commands matter: `make demo` and `make test`. Both set up .venv themselves.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo frontier matrix sources test test-all check bench clean

demo: .venv/.ready
	$(BIN)/favor demo

frontier: .venv/.ready
	$(BIN)/favor frontier recipes/frontier.toml

matrix: .venv/.ready
	cd tests && ../$(BIN)/python -W ignore matrix.py

sources: .venv/.ready
	cd tests && ../$(BIN)/python -W ignore bad_sources.py

test: .venv/.ready
	$(BIN)/pytest -m "not slow"

test-all: .venv/.ready
	$(BIN)/pytest

check: .venv/.ready
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/pyright --warnings
	$(MAKE) test

bench: .venv/.ready
	$(BIN)/pip install --quiet --constraint constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/vs_trl.py --data hh
	$(BIN)/python benchmarks/vs_trl.py --data demo

# The marker is written last, so an interrupted installation is taken up again.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv build src/*.egg-info
