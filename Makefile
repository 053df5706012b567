# `make demo` and `make test` need nothing but python3: they set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
test check fuzz: export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help demo test check fuzz fmt readme bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

demo: .venv/.base ## show the main job on the bundled fixtures
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash fixtures/demo.sh

test: .venv/.dev ## run all tests
	$(BIN)/python -m pytest -n 2

check: .venv/.dev ## what CI runs: format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict loratool
	$(BIN)/python -m pytest -n 2

fuzz: .venv/.dev ## try the property tests on many new examples
	FUZZ=20 $(BIN)/python -m pytest -n 2 -m hypothesis

fmt: .venv/.dev ## format the code and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

readme: .venv/.dev ## write the README's table of formats anew
	$(BIN)/python -m tests.test_formats_table

bench: .venv/.dev ## time a merge beside cp and PEFT
	$(BIN)/python -m benchmarks.merge

clean: ## remove the environment and every cache
	rm -rf .venv build dist loratool/_native.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.base: pyproject.toml constraints.txt hatch_build.py loratool/native.c
	$(PYTHON) -m venv .venv
	$(INSTALL) -e .
	@touch $@

.venv/.dev: .venv/.base
	$(INSTALL) -e '.[dev]'
	@touch $@
