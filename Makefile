# What developers run. Everything is installed into folders of this one, .venv first of all;
# nothing else on the machine changes.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
TOOLS := .venv-tools/installed
CHECKOV := .venv-checkov/installed
IMAGE := .venv-image/installed
BASE_IMAGE := python:3.11-slim

.DEFAULT_GOAL := help
.PHONY: help run test mutants simulate torture attack bench bench-chart audit check-database lint types check manifests policies
.PHONY: lock pin-image vulnerabilities sbom licences clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' Makefile | awk -F ':.*## ' '{printf "make %-15s %s\n", $$1, $$2}'

run: $(INSTALLED) ## Start the service and all it needs on this machine; Ctrl-C stops it
	@$(BIN)/python -m devstack $(ARGS)

test: $(INSTALLED) ## Run all tests with the coverage of app
	$(BIN)/python -m pytest tests/ --cov=app --cov-report=html --cov-report=term

mutants: $(INSTALLED) ## Put mistakes into a copy and see that the property tests fail; ARGS="lookup"
	@PYTHONPATH=.:tests $(BIN)/python -m mutants $(ARGS)

simulate: $(INSTALLED) ## Run the service on a virtual clock with faults; ARGS="--minutes 30"
	@PYTHONPATH=.:tests $(BIN)/python -m simulation $(ARGS)

torture: $(INSTALLED) ## Ten minutes of load with faults; ARGS="--minutes 1 --seed 7"
	@PYTHONPATH=.:tests $(BIN)/python tests/torture.py $(ARGS)

attack: $(INSTALLED) ## Ten minutes of attacks on the protocol, and the service's memory; ARGS="--minutes 1"
	@PYTHONPATH=.:tests $(BIN)/python -m security.attack $(ARGS)

bench: $(INSTALLED) ## Measure the service beside its peers, or with ARGS="--against REV" beside a revision
	@$(BIN)/python -m bench $(ARGS)

bench-chart: $(INSTALLED) ## Draw the chart of docs/performance.md from bench.json, which ARGS="--json bench.json" wrote
	@$(BIN)/python -m bench.chart bench.json docs/images/performance.svg

audit: $(INSTALLED) ## See whether a ledger adds up; the variable DATABASE_URL names another than the dev stack's
	@$(BIN)/python -m devstack.audit

check-database: $(INSTALLED) ## See what keeps a database from being migrated; the variable DATABASE_URL names it
	@$(BIN)/python -m devstack.check_database

lint: $(INSTALLED) ## Check the style of Python and SQL, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/python -m sqlfluff lint --disable-progress-bar supabase

types: $(INSTALLED) ## Check types
	$(BIN)/python -m mypy

check: lint types test ## lint, types and test: what must pass before a commit

manifests: ## Copy k8s/deployment.yaml to where the overlays can read it
	cp k8s/deployment.yaml k8s/overlays/base/manifests.yaml

policies: $(INSTALLED) $(CHECKOV) ## Hold the manifests against checkov's policies
	$(BIN)/python -m pytest -q tests/k8s/test_policies.py

lock: $(TOOLS) ## Write each .lock: a list of requirements with all it needs and the hash of every file
	@for list in requirements:3.11 requirements-dev:3.11 requirements-tools:3.11 requirements-checkov:3.11.5; do \
	  name=$${list%:*}; \
	  echo "# $$name.txt with all that it needs and the hash of every file, by make lock." > .venv-tools/lock && \
	  .venv-tools/bin/uv pip compile --quiet --universal --python-version $${list#*:} --generate-hashes \
	    --no-header --no-annotate --no-emit-index-url $$name.txt >> .venv-tools/lock && \
	  mv .venv-tools/lock $$name.lock || exit 1; \
	done

pin-image: ## Write the digest of the newest base image into the Dockerfile (needs Docker and the internet)
	@digest=$$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' $(BASE_IMAGE)) && \
	  echo "$$digest" | grep -Eqx 'sha256:[0-9a-f]{64}' || { echo 'Docker did not tell the digest of $(BASE_IMAGE).' >&2; exit 1; }; \
	  sed -E "s|^FROM $(BASE_IMAGE)(@[a-z0-9:]+)?|FROM $(BASE_IMAGE)@$$digest|" Dockerfile > Dockerfile.new && \
	  mv Dockerfile.new Dockerfile && grep '^FROM' Dockerfile

vulnerabilities: $(TOOLS) ## Look up the image's packages among known vulnerabilities (needs the internet)
	.venv-tools/bin/python -m pip_audit --strict --require-hashes --disable-pip -r requirements.lock

sbom: $(TOOLS) $(IMAGE) ## Write sbom.json: the image's Python packages with their licences, as CycloneDX
	$(BIN)/python -c 'import app; print("[project]\nname = \"payment-service\"\nversion =", repr(app.__version__))' \
	  > .venv-image/pyproject.toml
	.venv-tools/bin/python -m cyclonedx_py environment --pyproject .venv-image/pyproject.toml \
	  --mc-type application --output-reproducible --validate -o sbom.json .venv-image

licences: $(INSTALLED) ## Write the table of docs/licences.md: the licence of each package of the image
	@{ sed '/^|/,$$d' docs/licences.md; $(BIN)/python -m piplicenses --format markdown \
	  --packages $$(sed -nE 's/^([A-Za-z0-9._-]+).*==.*/\1/p' requirements.txt) \
	  --ignore-packages httpx-aiohttp; } > docs/licences.new && \
	  mv docs/licences.new docs/licences.md

clean: ## Delete what make has made: environments, the development database, caches
	-@python=$(BIN)/python; test -x $$python || python="$(PYTHON)"; \
	  test "$$(id -u)" != 0 || "$$python" -m devstack.server_account  # the data of root's dev stack
	rm -rf .venv .venv-tools .venv-checkov .venv-image .devstack .coverage htmlcov sbom.json
	rm -rf .mypy_cache .ruff_cache .pytest_cache

$(INSTALLED): requirements-dev.lock
	@command -v "$(PYTHON)" >/dev/null || { echo 'There is no program $(PYTHON). Install Python 3.11 or newer, or name it: make PYTHON=python3.12 ...' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ...")'
	@"$(PYTHON)" devstack/install.py

# As the Dockerfile installs: only files whose hash is known, and none that would have to be built.
$(IMAGE): requirements.lock $(INSTALLED)
	$(PYTHON) -m venv --clear --without-pip .venv-image
	$(BIN)/python -m pip --python .venv-image/bin/python install --disable-pip-version-check --quiet \
	  --only-binary :all: --require-hashes -r requirements.lock
	@touch $@

$(TOOLS) $(CHECKOV): .venv-%/installed: requirements-%.lock
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --disable-pip-version-check --quiet --require-hashes -r $<
	@touch $@
