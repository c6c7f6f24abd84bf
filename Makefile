# Two commands for a newcomer: `make demo` and `make test`. Both set up .venv when it is missing.
TORCH ?= torch==2.13.0
PYTHON ?= python3
WORKERS ?= 2
PY := .venv/bin/python
STAMP := .venv/.ready
DOCS := .venv/.docs

.PHONY: setup demo test test-slow test-integration theory bench-robustness bench-report docs slides docs-numbers docs-linkcheck lint types clean

setup: $(STAMP)

# torch comes first and alone, so that no other package chooses its build.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	@echo "1 of 2: $(TORCH), the largest download"
	$(PY) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@echo "2 of 2: lrmanifold and the tools for its tests"
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $(STAMP)

demo: $(STAMP)
	.venv/bin/lrmanifold demo

# One thread per worker: two workers on two cores beat one worker on two threads.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) -m "not slow"

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) -m slow

# Hugging Face, PEFT, accelerate, lightning, ONNX: large packages, so an extra of their own.
test-integration: $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[integration]"
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) tests/integration tests/checkpoint -m "not slow"

theory: $(STAMP)
	$(PY) -m theory
	$(PY) -m theory --controls
	$(PY) -m theory --mutate

# The plan for digits: about 40 minutes of one core. PLANS="digits fashion" names others. Go on by
# calling it again: nothing is repeated.
bench-robustness: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.robustness $(PLANS)
	$(PY) -m benchmarks.report

bench-report: $(STAMP)
	$(PY) -m benchmarks.report

$(DOCS): $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $(DOCS)

# Executes the lessons; a warning is an error. The site is docs/_build/html/index.html.
docs: $(DOCS)
	$(PY) -m sphinx -W --keep-going -n -q docs docs/_build/html

# One lesson as slides: make slides LESSON=4-well-conditioned; they need no internet either.
LESSON ?= 4-well-conditioned
slides: $(DOCS)
	LESSON=$(LESSON) $(PY) -m sphinx -b revealjs -q -c docs/slides docs docs/_build/slides
	@echo "docs/_build/slides/lessons/$(LESSON).html"

# Numbers of README and docs: measured once, and the same everywhere.
docs-numbers: $(STAMP)
	$(PY) -m benchmarks.docs_numbers

# Links to other sites, too; needs the internet.
docs-linkcheck: $(DOCS)
	$(PY) -m sphinx -b linkcheck -D nb_execution_mode=off -D suppress_warnings=myst-nb.lexer -q docs docs/_build/linkcheck

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/codespell

types: $(STAMP)
	$(PY) -m mypy

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
