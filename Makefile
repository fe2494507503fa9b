# make quickstart   install into .venv, fine-tune the embedded demo, leave pictures in runs/quickstart
# make test         the test suite, in two processes (WORKERS=8 for more; installs into .venv if needed)
# make fast         its mathematics and configuration alone, in half a minute
# make check        format, lint, types, tests
# make test-processors  the tests of numbers on the kernels of other processors, with one thread and two
# make test-lowest  the tests that meet the libraries, with the oldest versions that pyproject.toml allows, in .venv-lowest
# make test-gpu     the tests that need a CUDA device
# make planted      every planted bug must turn a test red (half an hour; BUGS="sampling ema" for some, JOBS=2)
# scripts/same_results.py COMMIT   runs a fixed list on that commit and on the working tree, and prints what differs
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOWEST := .venv-lowest

JOBS ?= 1
WORKERS ?= 2

# The oldest Python that will do: asked before pip is, which would speak of conflicting dependencies.
OLDEST_PYTHON := $(shell sed -n 's/^requires-python = ">=\(.*\)"/\1/p' pyproject.toml)
CHECK_PYTHON = $(PYTHON) -c 'import sys; own = ".".join(map(str, sys.version_info[:3])); \
	old = sys.version_info < tuple(map(int, "$(OLDEST_PYTHON)".split("."))); \
	sys.exit("make needs Python $(OLDEST_PYTHON) or newer, and $(PYTHON) is " + own + \
	": give another, as in  make PYTHON=python3.12 $(or $(MAKECMDGOALS),install)" if old else 0)'

# Mathematics and configuration: no pipeline is built, nothing is trained.
FAST := tests/diffusion tests/config/test_train.py tests/config/test_reading.py tests/config/test_yaml_text.py tests/training/test_learning_rate.py \
	tests/test_randomness.py
# The tests whose results are numbers, and the kernels to run them on; `own` are the fastest that this processor has.
NUMBERS := tests/diffusion tests/schedulers tests/model tests/adapters tests/data tests/sampling tests/evaluation \
	tests/training/test_wiring.py tests/training/test_diffusion_settings.py tests/training/test_ema.py \
	tests/test_golden.py tests/test_rounding.py
# Those that meet the libraries most, to be run with the oldest of them.
LIBRARIES := tests/diffusion tests/schedulers tests/model tests/adapters tests/data tests/pictures tests/sampling \
	tests/evaluation tests/config/test_train.py tests/training/test_ema.py tests/test_golden.py
KERNELS_default := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41
KERNELS_avx2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
KERNELS_own :=
PROCESSORS := $(foreach kernels,default avx2 own,$(foreach threads,1 2,test-on-$(kernels)-$(threads)))

.PHONY: test-processors $(PROCESSORS) test-lowest quickstart test fast test-slow test-gpu check planted format install clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(INSTALLED)
	rm -rf runs/quickstart
	$(BIN)/pixart-ft train --config quickstart
	$(BIN)/pixart-ft generate --model demo --lora runs/quickstart --prompt "cactus" --prompt "avocado" \
		--seed 7 --out runs/quickstart/generated

test: $(INSTALLED)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not slow and not gpu"

fast: $(INSTALLED)
	$(BIN)/python -m pytest -q $(FAST)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -q -m "slow and not gpu"

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -q -m gpu tests/test_gpu.py

test-processors: $(PROCESSORS)

$(PROCESSORS): test-on-%: $(INSTALLED)
	env $(KERNELS_$(firstword $(subst -, ,$*))) OMP_NUM_THREADS=$(lastword $(subst -, ,$*)) \
		$(BIN)/python -m pytest -q -p no:cacheprovider -m "not slow and not gpu" $(NUMBERS)

test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest -q -p no:cacheprovider -m "not slow and not gpu" $(LIBRARIES)

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet -c constraints-lowest.txt -e '.[dev]'
	touch $@

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
	rm -rf $(VENV) $(LOWEST) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
