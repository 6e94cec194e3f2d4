# What developers run. Everything is installed into .venv; nothing else on the machine changes.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.DEFAULT_GOAL := help
.PHONY: help run test torture bench audit lint types check clean

help: ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-7s %s\n", $$1, $$2}'

run: $(INSTALLED) ## Start the service and all it needs on this machine; Ctrl-C stops it
	@$(BIN)/python -m devstack $(ARGS)

test: $(INSTALLED) ## Run all tests with the coverage of app
	$(BIN)/python -m pytest tests/ --cov=app --cov-report=html --cov-report=term-missing

torture: $(INSTALLED) ## Ten minutes of load with faults; ARGS="--minutes 1 --seed 7"
	@PYTHONPATH=.:tests $(BIN)/python tests/torture.py $(ARGS)

bench: $(INSTALLED) ## Measure the service beside its peers with wrk; ARGS="--seconds 2"
	@$(BIN)/python -m bench $(ARGS)

audit: $(INSTALLED) ## See whether a ledger adds up; DATABASE_URL names another than the dev stack's
	@$(BIN)/python -m devstack.audit $(DATABASE_URL)

lint: $(INSTALLED) ## Check style, of Python and SQL
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/sqlfluff lint --disable-progress-bar supabase

types: $(INSTALLED) ## Check types
	$(BIN)/mypy

check: lint types test ## lint, types and test: what must pass before a commit

clean: ## Delete what make has made: .venv, the development database, caches
	rm -rf .venv .devstack .coverage htmlcov .mypy_cache .ruff_cache .pytest_cache

$(INSTALLED): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements-dev.txt
	@touch $(INSTALLED)
