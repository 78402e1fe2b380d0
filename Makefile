# make demo: environment, then train, validate, detect and export on the built-in data.  make test: the test suite.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python

.PHONY: demo test check slow clean
.DEFAULT_GOAL := demo

$(VENV)/.ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.ready-dev: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@ $(VENV)/.ready

demo: $(VENV)/.ready
	PY=$(PY) bash examples/demo.sh

test: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile

check: $(VENV)/.ready-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

slow: $(VENV)/.ready-dev
	$(PY) -m pytest -m slow

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache
