# Two commands for a newcomer: `make demo` and `make test`. Both set up .venv when it is missing.
TORCH ?= torch==2.13.0
PYTHON ?= python3
WORKERS ?= 2
PY := .venv/bin/python
STAMP := .venv/.ready

.PHONY: setup demo test test-slow theory lint types clean

setup: $(STAMP)

# torch comes first and alone, so that no other package chooses its build.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $(STAMP)

demo: $(STAMP)
	.venv/bin/lrmanifold demo

# One thread per worker: two workers on two cores beat one worker on two threads.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) -m "not slow"

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) -m slow

theory: $(STAMP)
	$(PY) -m theory
	$(PY) -m theory --controls

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(STAMP)
	$(PY) -m mypy

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
