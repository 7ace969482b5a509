# `make demo` and `make test` are all that a new machine needs: Python >= 3.11 and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test style types units soak clean

demo: .venv/ready
	$(BIN)/diffprune demo

test:
	$(MAKE) --no-print-directory --jobs 2 style types units

style types units: .venv/ready

style:
	$(BIN)/ruff check .

types:
	$(BIN)/mypy

units:
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: .venv/ready
	$(BIN)/pytest -n 2 -m soak
	$(BIN)/python -m benchmarks.soak

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "diffprune needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
