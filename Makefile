# Two commands matter: `make demo` and `make test`. Both set up .venv themselves.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo fault frontier frontier-format matrix templates zoo coverage broken-models bad-settings bad-sources settings-doc docs test dist test-all check smoke lock bench bench-gpu clean

demo: .venv/.ready
	$(BIN)/favor demo

frontier: .venv/.ready
	$(BIN)/favor frontier recipes/frontier.toml

# the same on a task of another kind
frontier-format: .venv/.ready
	$(BIN)/favor frontier recipes/frontier.toml run=runs/frontier-format embedded=format

matrix: .venv/.ready
	cd tests && ../$(BIN)/python -W ignore matrix.py

coverage: .venv/.ready
	cd tests && ../$(BIN)/python -W ignore interval_coverage.py

broken-models: .venv/.ready
	cd tests && PYTHONPATH=. ../$(BIN)/python -W ignore broken_models.py

# chat templates that no wheel ships, from a source package
LLAMA_CPP := llama_cpp_python-0.3.36
templates: .venv/.ready
	mkdir -p build/templates
	$(BIN)/pip download --quiet --no-deps --no-binary :all: --dest build/templates $(subst _,-,$(subst -,==,$(LLAMA_CPP)))
	tar xzf build/templates/$(LLAMA_CPP).tar.gz -C build/templates --strip-components=5 $(LLAMA_CPP)/vendor/llama.cpp/models/templates
	FAVOR_TEMPLATES=$(CURDIR)/build/templates $(BIN)/pytest tests/data/test_templates.py

zoo: .venv/.ready
	cd tests && ../$(BIN)/python -W ignore zoo.py

# kills, full disks and damage against every command that writes; at most 20 minutes
fault: .venv/.ready
	cd tests && ../$(BIN)/python -W ignore fault.py

bad-settings: .venv/.ready
	cd tests && ../$(BIN)/python -W ignore bad_settings.py

bad-sources: .venv/.ready
	cd tests && ../$(BIN)/python -W ignore bad_sources.py

# the list of all settings, from the code
settings-doc: .venv/.ready
	$(BIN)/python docs/settings.py

# the documentation as a site, in build/site; a warning is an error
docs: .venv/.ready
	$(BIN)/pip install --quiet --constraint constraints.txt -e ".[docs]"
	$(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

test: .venv/.ready
	$(BIN)/pytest -m "not slow"

# runs over 2 and 4 processes against one
dist: .venv/.ready
	$(BIN)/pytest -m dist

test-all: .venv/.ready
	$(BIN)/pytest

check: .venv/.ready
	$(BIN)/ruff format --check src tests benchmarks experiments examples
	$(BIN)/ruff check src tests benchmarks experiments examples
	$(BIN)/pyright --warnings
	$(MAKE) test
	$(MAKE) smoke

# What a user has: an empty environment, the core dependencies under their hashes, and the wheel. docs/security.md says why
# torch stands apart.
smoke:
	rm -rf build
	$(PYTHON) -m venv build/smoke
	build/smoke/bin/pip install --quiet --no-deps --require-hashes -r requirements.lock
	build/smoke/bin/pip install --quiet --constraint constraints.txt torch
	build/smoke/bin/pip wheel --quiet --no-deps --wheel-dir build/wheel .
	build/smoke/bin/pip install --quiet --no-deps build/wheel/favor-*.whl
	build/smoke/bin/pip check
	build/smoke/bin/python tests/smoke.py

# Write requirements.lock anew from pyproject.toml and constraints.txt.
lock:
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet uv
	echo "torch; sys_platform == 'none'" > build/lock/without-torch.txt
	build/lock/bin/uv pip compile --quiet --generate-hashes --no-header --no-annotate --python-version 3.11 \
		--constraint constraints.txt --override build/lock/without-torch.txt --output-file requirements.lock pyproject.toml

# on a GPU: MFU, pairs a second, peak memory, beside TRL
bench-gpu: .venv/.ready
	$(BIN)/pip install --quiet --constraint constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/gpu.py

# beside TRL and transformers: by the shape of the data in both formats, GRPO and sampling, the demo's pairs (hours on two cores)
bench: .venv/.ready
	$(BIN)/pip install --quiet --constraint constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/shapes.py
	$(BIN)/python benchmarks/shapes.py --dtype bfloat16
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/vs_trl.py --data demo

# The marker is written last, so an interrupted installation is taken up again.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv build src/*.egg-info
