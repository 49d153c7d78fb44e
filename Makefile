# Everything goes through `make`: CI calls the same targets. Variables: ARGS, VENV, PYTHON.

SHELL := /bin/bash
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
export VENV PYTHON

.DEFAULT_GOAL := help
.PHONY: help up pull chat test check format test-gpu test-fresh test-compose bench install install-dev install-gpu clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install:
	@scripts/venv.sh engine

install-dev:
	@scripts/venv.sh dev

install-gpu:
	@scripts/venv.sh gpu

up: install  ## a whole cluster on this machine; ARGS="--prefill 2 --decode 2"
	@$(BIN)/phloem up $(ARGS)

pull: install  ## the demo model, or ARGS=NAME, into the model cache
	@$(BIN)/phloem pull $(ARGS)

chat: install  ## talk to the running cluster
	@$(BIN)/phloem chat $(ARGS)

test: install-dev  ## everything that can be tested without a GPU or Docker
	$(BIN)/python -m pytest -m "not gpu and not compose" $(ARGS)

check: install-dev  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p phloem
	$(BIN)/mypy tests benchmarks

format: install-dev  ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-gpu: install-gpu  ## what needs a CUDA device, with FlashInfer
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-fresh:  ## `make up` as a newcomer does it, from a fresh clone of HEAD; takes minutes
	scripts/fresh_clone_check.sh

test-compose: install-dev  ## docker compose on a real engine; as root, with docker, debootstrap, iproute2
	tests/compose/run.sh $(ARGS)

bench: install-dev  ## the committed benchmarks
	@for bench in benchmarks/bench_*.py; do echo "== $$bench"; $(BIN)/python $$bench $(ARGS) || exit 1; done

clean:  ## the caches, not the environment
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
