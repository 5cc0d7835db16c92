# Every target sets up what it needs in a virtual environment of its own.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
RUNS ?= runs
NATIVE = $(wildcard csrc/*.* csrc/*/*.* tests/kernels/*.cu tests/kernels/cuda_on_cpu/*)

.PHONY: demo test soak compat evaluate bench budget-run pages lint format env clean

demo: $(VENV)/installed  ## train a negative model for the embedded demo, show and judge what it does
	$(BIN)/python -m selfnpo.train --output_dir $(RUNS)/demo --overwrite
	$(BIN)/python -m selfnpo.sample --negative $(RUNS)/demo/negative --guidance_scale 3 --output $(RUNS)/demo/samples.png --overwrite
	$(BIN)/python -m selfnpo.evaluate --arms self-npo --num_samples 1000 --guidance_scales 2 3 --seeds 20 21 22 \
		--output_dir $(RUNS)/demo/evaluation --overwrite

test: $(VENV)/installed  ## what CI runs
	$(BIN)/python -m pytest -q -n auto -m "not slow"

soak: $(VENV)/installed  ## the slow checks: variants, and many kills in a row
	$(BIN)/python -m pytest -q -n auto -m slow
	SELFNPO_KILLS=20 $(BIN)/python -m pytest -q tests/training/test_trainer.py -k killed

compat: $(VENV)/installed  ## kernel and step tests under the oldest and the newest torch and Triton (20 GB of disk)
	$(BIN)/python tests/compat.py $(ROWS)

evaluate: $(VENV)/installed  ## the README's table: every baseline, fresh rollouts, six fine-tunes of each
	$(BIN)/python -m selfnpo.evaluate --arms self-npo fresh random early shuffled --output_dir $(RUNS)/evaluation --overwrite

bench: test  ## speed is never reported on a red test
	$(BIN)/python -m pytest benchmarks --benchmark-only -q

budget-run: $(VENV)/installed  ## the paper's 1,000 x 20 steps with random weights: hours and energy
	$(BIN)/python -m benchmarks.budget_run

pages: $(VENV)/installed  ## write the tables and pictures of README and docs anew, from the newest results
	$(BIN)/python -m benchmarks.pages

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

env: $(VENV)/installed  ## versions and kernels, for bug reports
	$(BIN)/python -m selfnpo.env

clean:
	rm -rf $(VENV) build *.egg-info selfnpo_kernels/*.so

$(VENV)/installed: pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "selfnpo needs Python 3.10 or newer, this is " + sys.version'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
