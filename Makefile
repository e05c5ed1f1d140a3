# Start with `make example` or `make test`. Both set up .venv first if it is not complete.
PYTHON ?= python3
ARGS ?=
# Number of tests that run in parallel; most use one core.
TEST_JOBS ?= 2

.PHONY: help setup example compare test test-all check lint types clean

help:
	@echo "make example [ARGS='max_steps=10']   train the embedded example with GSPO"
	@echo "make compare [ARGS='max_steps=40']   train GSPO and GRPO with three seeds each and compare them"
	@echo "make test [ARGS='-k ratio']          run the test suite, TEST_JOBS=2 tests in parallel"
	@echo "make test-all                        run also the tests that take minutes each"
	@echo "make check                           run lint, types and tests"
	@echo "make setup                           set up .venv only"
	@echo "make clean                           remove .venv, builds and output"

setup:
	@$(PYTHON) scripts/setup_env.py

example: setup
	.venv/bin/python -m roll_gspo.run --config-name example_gspo $(ARGS)

# Finished runs are kept and others resume from their last checkpoint, so calling it again completes the comparison.
compare: setup
	.venv/bin/python -m roll_gspo.run --multirun --jobs 2 --config-name example_gspo algorithm=gspo,grpo seed=0,1,2 \
		exp_name=gspo_vs_grpo resume_from_checkpoint=true $(ARGS)
	.venv/bin/python -m roll_gspo.compare output/gspo_vs_grpo

test: setup
	.venv/bin/python -m pytest -n $(TEST_JOBS) --dist worksteal $(ARGS)

test-all: setup
	.venv/bin/python -m pytest -m 'long or not long' $(ARGS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: setup
	.venv/bin/pyright

check: lint types test

clean:
	rm -rf .venv build dist *.egg-info output
