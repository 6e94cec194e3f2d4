# Commands for developers; `make help` lists them. Packages are installed into .venv and other
# folders of the checkout, never elsewhere on the machine.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
TOOLS := .venv-tools/installed
CHECKOV := .venv-checkov/installed
IMAGE := .venv-image/installed
BASE_IMAGE := python:3.11-slim

.DEFAULT_GOAL := help
.PHONY: help run clean check lint types test torture simulate mutants attack bench bench-chart images
.PHONY: check-database audit manifests policies lock licences vulnerabilities sbom pin-image

help: ## Show this list
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

##@ Run

run: $(INSTALLED) ## Start the service and its dependencies; Ctrl-C stops them; ARGS=--help lists options
	@$(BIN)/python -m devstack $(ARGS)

clean: ## Delete everything that make created: environments, development database, caches
	-@python=$(BIN)/python; test -x $$python || python="$(PYTHON)"; \
	  test "$$(id -u)" != 0 || "$$python" -m devstack.server_account  # deletes the data of root's dev stack
	rm -rf .venv .venv-tools .venv-checkov .venv-image .devstack .coverage htmlcov sbom.json
	rm -rf .mypy_cache .ruff_cache .pytest_cache

##@ Test

check: lint types test ## Run lint, types and test; must pass before a commit

lint: $(INSTALLED) ## Check the style of Python and SQL, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/python -m sqlfluff lint --disable-progress-bar supabase

types: $(INSTALLED) ## Check the types
	$(BIN)/python -m mypy

test: $(INSTALLED) ## Run all tests and measure the coverage of app/
	$(BIN)/python -m pytest tests/ --cov=app --cov-report=html --cov-report=term

torture: $(INSTALLED) ## Run ten minutes of load with faults; ARGS="--minutes 1 --seed 7"
	@PYTHONPATH=.:tests $(BIN)/python tests/torture.py $(ARGS)

simulate: $(INSTALLED) ## Run the service on a virtual clock with faults; ARGS="--minutes 30"
	@PYTHONPATH=.:tests $(BIN)/python -m simulation $(ARGS)

mutants: $(INSTALLED) ## Put known mistakes into a copy; check that the property tests fail; ARGS="lookup"
	@PYTHONPATH=.:tests $(BIN)/python -m mutants $(ARGS)

attack: $(INSTALLED) ## Attack the protocol for ten minutes and watch the memory; ARGS="--minutes 1"
	@PYTHONPATH=.:tests $(BIN)/python -m security.attack $(ARGS)

##@ Measure

bench: $(INSTALLED) ## Measure the service and its peers; ARGS="--against REV" compares with a revision
	@$(BIN)/python -m bench $(ARGS)

bench-chart: $(INSTALLED) ## Draw docs/images/performance.svg from bench.json (make bench ARGS="--json bench.json")
	@$(BIN)/python -m bench.chart bench.json docs/images/performance.svg

images: $(INSTALLED) ## Take the pictures of Swagger UI and of the dashboard (needs Chromium and Prometheus)
	@$(BIN)/python -m bench.swagger docs/images/swagger.png
	@$(BIN)/python -m bench.dashboard docs/images/dashboard.png

##@ Database

audit: $(INSTALLED) ## List ledger entries and balances that do not add up; DATABASE_URL names another database
	@$(BIN)/python -m devstack.audit

check-database: $(INSTALLED) ## List what prevents the migration of the database that DATABASE_URL names
	@$(BIN)/python -m devstack.check_database

##@ Kubernetes

manifests: ## Copy k8s/deployment.yaml to k8s/overlays/base, where the overlays read it
	cp k8s/deployment.yaml k8s/overlays/base/manifests.yaml

policies: $(INSTALLED) $(CHECKOV) ## Check the manifests with checkov
	$(BIN)/python -m pytest -q tests/k8s/test_policies.py

##@ Dependencies

lock: $(TOOLS) ## Write the lock of each list of requirements: all packages with the hashes of their files
	@for list in requirements:3.11 requirements-dev:3.11 requirements-tools:3.11 requirements-checkov:3.11.5; do \
	  name=$${list%:*}; \
	  echo "# $$name.txt with all that it needs and the hash of every file, by make lock." > .venv-tools/lock && \
	  .venv-tools/bin/uv pip compile --quiet --universal --python-version $${list#*:} --generate-hashes \
	    --no-header --no-annotate --no-emit-index-url $$name.txt >> .venv-tools/lock && \
	  mv .venv-tools/lock $$name.lock || exit 1; \
	done

licences: $(INSTALLED) ## Write docs/licences.md: the licence of each package of the image
	@{ sed '/^|/,$$d' docs/licences.md; $(BIN)/python -m piplicenses --format markdown \
	  --packages $$(sed -nE 's/^([A-Za-z0-9._-]+).*==.*/\1/p' requirements.txt) \
	  --ignore-packages httpx-aiohttp; } > docs/licences.new && \
	  mv docs/licences.new docs/licences.md

vulnerabilities: $(TOOLS) ## Look up known vulnerabilities of the image's packages (needs the internet)
	.venv-tools/bin/python -m pip_audit --strict --require-hashes --disable-pip -r requirements.lock

sbom: $(TOOLS) $(IMAGE) ## Write sbom.json (CycloneDX): the image's Python packages with their licences
	$(BIN)/python -c 'import app; print("[project]\nname = \"payment-service\"\nversion =", repr(app.__version__))' \
	  > .venv-image/pyproject.toml
	.venv-tools/bin/python -m cyclonedx_py environment --pyproject .venv-image/pyproject.toml \
	  --mc-type application --output-reproducible --validate -o sbom.json .venv-image

pin-image: ## Write the digest of the newest base image into the Dockerfile (needs Docker)
	@digest=$$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' $(BASE_IMAGE)) && \
	  echo "$$digest" | grep -Eqx 'sha256:[0-9a-f]{64}' || { echo 'Docker returned no digest of $(BASE_IMAGE).' >&2; exit 1; }; \
	  sed -E "s|^FROM $(BASE_IMAGE)(@[a-z0-9:]+)?|FROM $(BASE_IMAGE)@$$digest|" Dockerfile > Dockerfile.new && \
	  mv Dockerfile.new Dockerfile && grep '^FROM' Dockerfile

$(INSTALLED): requirements-dev.lock
	@command -v "$(PYTHON)" >/dev/null || { echo 'There is no program $(PYTHON). Install Python 3.11 or newer, or name it: make PYTHON=python3.12 ...' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ...")'
	@"$(PYTHON)" devstack/install.py

# Installs as the Dockerfile does: only files with a known hash, and no package that must be built.
$(IMAGE): requirements.lock $(INSTALLED)
	$(PYTHON) -m venv --clear --without-pip .venv-image
	$(BIN)/python -m pip --python .venv-image/bin/python install --disable-pip-version-check --quiet \
	  --only-binary :all: --require-hashes -r requirements.lock
	@touch $@

$(TOOLS) $(CHECKOV): .venv-%/installed: requirements-%.lock
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --disable-pip-version-check --quiet --require-hashes -r $<
	@touch $@
