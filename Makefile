# make demo: environment, then train, validate, detect and export on the built-in data.  make test: the test suite.
# make oldest: the suite with the oldest versions that the requirements allow, in an environment of its own (6 GB).
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
OLDEST_PYTHON ?= python3.10
OLDEST := .venv-oldest

.PHONY: demo test oldest check slow clean
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

$(OLDEST)/.ready: requirements-oldest.txt
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet -r requirements-oldest.txt
	touch $@

oldest: $(OLDEST)/.ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile

check: $(VENV)/.ready-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

slow: $(VENV)/.ready-dev
	$(PY) -m pytest -m slow

clean:
	rm -rf $(VENV) $(OLDEST) runs .pytest_cache .ruff_cache .mypy_cache
