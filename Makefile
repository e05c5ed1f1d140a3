# Two commands do everything: `make example` and `make test`. Both set up .venv first if it is not ready.
PYTHON ?= python3
ARGS ?=
# Tests side by side; most use one core each.
TEST_JOBS ?= 2

.PHONY: help setup example compare test test-all check lint types clean

help:
	@echo "make example [ARGS='max_steps=10']   watch GSPO learn on this machine"
	@echo "make compare [ARGS='max_steps=40']   GSPO and GRPO with three seeds each, on the same axes"
	@echo "make test [ARGS='-k ratio']          run the test suite, two tests side by side (TEST_JOBS=2)"
	@echo "make test-all                        and the tests that take minutes each"
	@echo "make check                           lint, types and tests"

setup:
	@$(PYTHON) scripts/setup_env.py

example: setup
	.venv/bin/python -m roll_gspo.run --config-name example_gspo $(ARGS)

# Finished runs are kept, others go on from their last checkpoint: calling it again does what is left.
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
