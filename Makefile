# Everything is made from a virtual environment in .venv, which makes itself. `make` alone lists the targets.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The Python with which .venv is made: 3.11 or later.
PYTHON ?= $(shell command -v python3.11 || echo python3)
BIN := .venv/bin
VENV := .venv/made
# Additional arguments for the tool that a target runs: make test ARGS="-k chord -x"
ARGS ?=

.PHONY: help
help: ## This list
	@awk 'BEGIN { FS = ":.*## " } /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	    /^[a-z-]+:.*## / { printf "  make %-20s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

##@ Run
# USERS, KEEP and REPLACE reach the demo through the environment.
.PHONY: demo up down check
demo: $(VENV) ## The main job from beginning to end (USERS=200000; KEEP=1 leaves the stack up, REPLACE=1 first deletes a kept one)
	@$(BIN)/segsvc demo $(ARGS)

up: $(VENV) ## Start the whole stack on this machine
	@$(BIN)/segsvc up $(ARGS)

down: $(VENV) ## Stop it (the data stays)
	@$(BIN)/segsvc down $(ARGS)

check: $(VENV) ## Recompute every membership of the running stack and compare
	@$(BIN)/segsvc check $(ARGS)

.PHONY: psql logs
psql: $(VENV) ## psql on a database of the running stack (DB=shard-0; ARGS="-c 'SELECT 1'")
	@$(BIN)/python tools/psql.py $(or $(DB),catalog) $(ARGS)

logs: ## Follow the logs of the running stack (P=bridge: of one process)
	@tail -n 20 -F build/stack/logs/$(or $(P),*).log

##@ Test
.PHONY: test test-unit test-long test-failure test-infrastructure test-docker simulate soak fresh
test: $(VENV) ## All tests, unit to end-to-end, on real components
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

test-unit: $(VENV) ## The tests that need no server, in under a minute
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) tests/unit $(ARGS)

# A test mostly waits for processes to start and stop, so two run at a time. ARGS="-n 0": one after the other.
SIDE_BY_SIDE := --numprocesses=2 --dist=loadscope --no-loadscope-reorder

test-long: $(VENV) ## The tests that take minutes: a million conditions, the service against its model
	@$(BIN)/python -m pytest -m long $(ARGS)

test-failure: $(VENV) ## The fault matrix: every point of the commit protocol × every fault, shard and operation
	@$(BIN)/python -m tests.failure.run $(ARGS)

test-infrastructure: $(VENV) ## Servers are killed, emptied, full or out of slots while operations need them
	@$(BIN)/python -m pytest -m "not docker" tests/infrastructure $(ARGS)

test-docker: $(VENV) ## The chord on containers (skipped, and counted, where there is no Docker engine)
	@$(BIN)/python -m pytest -m docker tests/docker $(ARGS)

simulate: $(VENV) ## Both protocols under 100,000 schedules of crashes, losses and delays (SCHEDULES=)
	@$(BIN)/python -m tests.simulation.run --schedules $(or $(SCHEDULES),100000) $(ARGS)

soak: $(VENV) ## Load during random faults; every answer is checked (MINUTES=10)
	@$(BIN)/python -m tests.soak.run --minutes $(or $(MINUTES),10) $(ARGS)

fresh: ## Demo and test from a clean clone in an empty home directory
	@tools/fresh

##@ Measure
.PHONY: bench bench-check
bench: $(VENV) ## Benchmarks and their references, as a table and in benchmarks/results (ONLY=read_hit: one)
	@$(BIN)/python -m benchmarks.run $(ONLY) $(ARGS)

bench-check: $(VENV) ## The same; fails if a goal is missed
	@$(BIN)/python -m benchmarks.run --check $(ONLY) $(ARGS)

##@ Check and generate
.PHONY: sure fmt fmt-check lint types imports proto proto-check client-protos lock sbom audit
sure: fmt-check lint types imports proto-check test ## All checks and tests; must pass before a commit

fmt: $(VENV) ## Format the code, and fix what ruff can fix
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

fmt-check: $(VENV)
	@$(BIN)/ruff format --check .

lint: $(VENV) ## Ruff's rules
	@$(BIN)/ruff check .

types: $(VENV) ## mypy --strict
	@$(BIN)/mypy

imports: $(VENV) ## Check which modules may import which
	@$(BIN)/lint-imports

proto: $(VENV) ## Generate grpc_api/generated from protos/
	@$(BIN)/python tools/protos.py generate

proto-check: $(VENV) ## Check protos/ (lint, format, compatibility), and that the generated code is current
	@$(BIN)/python tools/protos.py check

client-protos: $(VENV) ## Write build/client-protos, from which a client in any language can be generated
	@$(BIN)/python tools/protos.py clients

lock: $(VENV) ## Make both lock files from setup.cfg (UPGRADE=1: with the newest versions that it allows)
	@$(BIN)/uv pip compile $(LOCK) --all-extras --output-file requirements.lock setup.cfg
	@$(BIN)/uv pip compile $(LOCK) --constraint requirements.lock --output-file docker/requirements.lock setup.cfg

sbom: $(VENV) ## Write build/sbom.json (CycloneDX: what the image is made of) and docs/licences.md
	@$(BIN)/python tools/sbom.py

audit: $(VENV) ## Look the image's packages up in a database of known vulnerabilities; fails if it cannot be reached
	@$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement docker/requirements.lock $(ARGS)

LOCK = --no-config --quiet --python-version 3.11 --python-platform linux --generate-hashes --no-emit-index-url \
    --no-emit-find-links --no-annotate $(if $(UPGRADE),--upgrade) --custom-compile-command "make lock"

##@ Clean up
.PHONY: clean
clean: ## Stop the stack; remove .venv, build and caches
	@if [ -x $(BIN)/segsvc ]; then $(BIN)/segsvc down; fi
	@rm -rf .venv build dist ./*.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV): requirements.lock setup.cfg tools/make-venv
	@tools/make-venv $(PYTHON)

.PHONY: .venv
.venv: $(VENV)
