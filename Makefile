# make quickstart   install into .venv, fine-tune the embedded demo, leave pictures in runs/quickstart
# make test         the test suite (installs into .venv if needed)
# make check        format, lint, types, tests
# make planted      every planted bug must turn a test red (half an hour; BUGS="sampling ema" for some, JOBS=2)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

JOBS ?= 1

.PHONY: quickstart test test-slow check planted format install clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(INSTALLED)
	rm -rf runs/quickstart
	$(BIN)/pixart-ft train --config quickstart
	$(BIN)/pixart-ft generate --model demo --lora runs/quickstart --prompt "rocket" --prompt "mushroom" \
		--seed 7 --out runs/quickstart/generated

test: $(INSTALLED)
	$(BIN)/python -m pytest -q -m "not slow and not gpu"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -q -m "slow and not gpu"

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

planted: $(INSTALLED)
	$(BIN)/python scripts/planted_bugs.py --jobs $(JOBS) $(BUGS)

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
