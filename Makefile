# Everything runs in .venv, which the first target to need it makes.  `make help` lists the targets.

BIN := .venv/bin
ARGS ?=
# The whole suite must fit; a test that hangs is ended with an interrupt, so that pytest still reports.
TEST_SECONDS ?= 1200
# Of pytest-xdist: two cores and one, for the tests of processes mostly wait.  One test file alone is faster without.
WORKERS ?= $(if $(ARGS),0,3)
TIMEOUT := $(shell command -v timeout >/dev/null 2>&1 && echo timeout --foreground --signal=INT --kill-after=30 $(TEST_SECONDS))

# Where this is set, every process compiles every module anew.
unexport PYTHONDONTWRITEBYTECODE
export TEST_BROWSER CHROMIUM SCREENSHOTS

.DEFAULT_GOAL := help
.PHONY: help env demo kill image image-base test test-quick test-ecosystem test-conformance test-browser test-js test-metrics test-triton test-gpu lint format types bench figures hostile mutants clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo "  PYTHON=/path/to/python3 chooses the interpreter, ARGS=... goes to pytest or to the demo."

env: ## Make or renew .venv (every other target does so too)
	@PYTHON="$(PYTHON)" sh scripts/setup.sh

demo: env ## Start three nodes and let text come out of them; KEEP=1 leaves them up until Ctrl-C, with a page
	@$(BIN)/python scripts/demo.py $(if $(KEEP),--keep) $(ARGS)

kill: ## Kill the server in use (or NODE=2) of a demo with KEEP=1; on its page the text goes on
	@$(BIN)/python scripts/demo.py --kill $(NODE)

image: ## Build the image of nodes and gateways with Docker or buildah; BASE=IMAGE, TORCH=cuda, EXTRAS=gateway,metrics, ARGS="--no-cache"
	@$(or $(PYTHON),python3) scripts/image.py build $(if $(BASE),--base $(BASE)) $(if $(TORCH),--torch $(TORCH)) \
		$(if $(EXTRAS),--build-arg EXTRAS=$(EXTRAS)) $(ARGS)

image-base: ## Make a base for the image of Debian's packages, where no registry of images is in reach
	@$(or $(PYTHON),python3) scripts/image.py base $(ARGS)

test: env ## Run the tests; ARGS="-k frames -x" goes to pytest, WORKERS=N runs them in N processes
	@OMP_NUM_THREADS=1 $(TIMEOUT) $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-quick: env ## Run the tests without real models, processes and swarms: tests/unit and tests/io
	@OMP_NUM_THREADS=1 $(TIMEOUT) $(BIN)/python -m pytest -n $(WORKERS) tests/unit tests/io $(ARGS)

test-ecosystem: env ## Run other packages (peft, trl, lm-eval, outlines) over a swarm, in an environment of their own
	@PYTHON=$(BIN)/python sh scripts/ecosystem.sh
	@OMP_NUM_THREADS=1 .venv-ecosystem/bin/python -m pytest -n 0 tests/ecosystem $(ARGS)

test-metrics: env ## Check scrapes, rules and the configuration of Prometheus with promtool, which is brought here
	@command -v promtool >/dev/null 2>&1 || sh scripts/promtool.sh
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 tests/unit/test_promtool.py tests/unit/test_metrics_page.py \
		tests/fault/test_metrics_processes.py $(ARGS)

test-gpu: env ## Run the check for machines with a GPU on this one's CPU, in tiny sizes: scripts/gpu_check.sh
	@mkdir -p build && OUT=build PYTHON=$(BIN)/python OMP_NUM_THREADS=1 sh scripts/gpu_check.sh --device cpu --small $(ARGS)

test-browser: env ## Drive the gateway's page with Chromium and Playwright; SCREENSHOTS=1 writes docs/page-dark.png and -light.png
	@PYTHON=$(BIN)/python sh scripts/browser.sh
	@OMP_NUM_THREADS=1 $(TIMEOUT) .venv-browser/bin/python -m pytest -n $(if $(ARGS),0,2) tests/browser $(ARGS)

test-js: env ## Let a relay of js-libp2p, which npm brings, carry a home's tokens in a lab of network namespaces
	@sh scripts/js_libp2p.sh
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 tests/lab/test_foreign_relays.py $(ARGS)

test-conformance: env ## Let clients of OpenAI's API (openai, litellm, langchain, llm, schemathesis) ask a gateway, in an environment of their own
	@PYTHON=$(BIN)/python sh scripts/conformance.sh
	@OMP_NUM_THREADS=1 .venv-conformance/bin/python -m pytest -n 0 tests/conformance $(ARGS)

test-triton: env ## Compare the kernels for GPUs with float64 in Triton's interpreter and compile them for two cards, in an environment of its own
	@PYTHON=$(BIN)/python sh scripts/triton.sh
	@TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venv-triton/bin/python -m pytest -n $(if $(ARGS),0,2) tests/model/test_triton_kernels.py $(ARGS)
	@OMP_NUM_THREADS=1 .venv-triton/bin/python -m pytest -n $(if $(ARGS),0,2) tests/model/test_triton_compile.py $(ARGS)

lint: env ## Check style and formatting
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

format: env ## Put the code into the project's format, and mend what ruff can
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

types: env ## Check types
	@$(BIN)/mypy

bench: env ## Measure decoding over one and over three servers
	@$(BIN)/python -m benchmarks decode --servers 1 $(ARGS)
	@$(BIN)/python -m benchmarks decode --servers 3 $(ARGS)

figures: env ## Measure the usual results, and write the tables and pictures of the documents; ARGS="wan executor" measures these
	@$(BIN)/python -m benchmarks figures --measure $(ARGS)

hostile: env ## Attack real nodes beside an honest client and newcomers: half an hour; ARGS="where_flood --seconds 4" runs these
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.hostile $(if $(ARGS),$(ARGS),--all)

mutants: env ## Change the pure modules in small ways and count the changes that the tests notice
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks mutants --json docs/figures/mutants.json $(ARGS)

clean: ## Remove .venv and every cache in this folder (not the models)
	rm -rf .venv .venv-ecosystem .venv-conformance .venv-triton .promtool .js-libp2p build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .venv-browser
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
