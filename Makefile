# make demo    install what is missing, then turn the example photo into a scene (on a CPU too)
# make test    install what is missing, then run the whole test suite in WORKERS processes
# make lint    ruff (lint and format) and mypy
# make bench   install what is missing, then measure the operators; make bench SUITE=pipeline: the
#              stages. Rows go to benchmarks/results/, see docs/benchmarks.md
# make sanitize  the C++ code's tests under the address, undefined and thread sanitizers
# make fuzz    CASES (a million) malformed files for the C++ readers, under the first two
# make clean   remove the virtual environment, caches and build products (results stay)

PYTHON ?= python3
# An exact version: pip then takes the wheel that is offered nearest (a CPU build from a configured
# index or folder, the ordinary wheel elsewhere) instead of searching for the newest one in a range.
# For another build: make test TORCH=torch==2.11.0
TORCH ?= torch==2.13.0
EXTRAS ?= dev
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
OUTPUTS ?= outputs
PYTEST_ARGS ?=
SUITE ?= kernels
CASES ?= 1000000
BENCH_ARGS ?=
# Small tensors: more threads than physical cores only slow them down, and threads that spin while
# they wait make a run several times slower when other processes share the cores (measured on 2
# cores: denoising 18.0 s spinning, 2.6 s passive). Neither changes a result.
THREADS ?= 2
WORKERS ?= 2
OPENMP := OMP_NUM_THREADS=$(THREADS) OMP_WAIT_POLICY=passive

.PHONY: demo test lint bench sanitize fuzz clean install
.DELETE_ON_ERROR:

install: $(STAMP)

$(STAMP): pyproject.toml setup.py $(wildcard engine/csrc/*.cpp engine/csrc/*.h)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@echo "installing into $(VENV) (a few minutes the first time)"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -qq "setuptools>=77" wheel "pybind11>=2.13" "$(TORCH)"
	$(PY) -m pip install -qq --no-build-isolation --editable ".[$(EXTRAS)]"
	touch $@

demo: $(STAMP)
	$(OPENMP) $(VENV)/bin/gen3r-engine run --frame_path examples/1view/photo.jpg \
	  --prompts examples/1view/prompts.txt --cameras arc_left --output_dir $(OUTPUTS)

# A process a core with one thread each; files stay whole, as some start processes of their own, and
# in their order: those with the fewest tests, which would come last, take longest.
test: $(STAMP)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(STAMP)
	$(OPENMP) $(VENV)/bin/gen3r-engine bench --suite $(SUITE) $(BENCH_ARGS)

sanitize:
	for sanitizer in address undefined thread; do \
	  $(MAKE) --no-print-directory -C engine/csrc check SANITIZER=$$sanitizer || exit 1; done

fuzz:
	$(MAKE) --no-print-directory -C engine/csrc fuzz SANITIZER=address CASES=$(CASES)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f engine/gen3r_engine/_C.*.so
	find . -name '*.egg-info' -maxdepth 2 -type d -prune -exec rm -rf {} +
