# `make` lists the targets. Everything runs in .venv, made on first use from the hashed lock in .ci/requirements.txt.

PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
DATA ?= oplog-data
SEED ?= 1
KILLS ?= 300

.PHONY: help setup demo serve test clients check lint types bench bench-peers bench-scale bench-tpch faults dist lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: .venv/ready ## make .venv with pinned dependencies and this package

.venv/ready: .ci/requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "flight_oplog needs Python 3.11 or newer on the PATH" >&2; exit 1; }
	@echo "setting up .venv (about a minute the first time)"
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .ci/requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: setup ## set up, stream real data in, ask SQL questions through ADBC
	@$(BIN)/python clients/python/demo.py

serve: setup ## serve the log in DATA (default oplog-data) on grpc://127.0.0.1:8815
	@$(BIN)/flight-oplog serve --data $(DATA)

test: setup ## set up and pass the tests
	@$(BIN)/python -m pytest

lint: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

types: setup
	@$(BIN)/mypy

clients: setup ## run the clients of every language against a server, as far as their toolchains are there
	@$(BIN)/python -m pytest -rs --timeout 1500 clients/test_clients.py clients/test_secured.py

check: lint types test ## lint, types and tests

bench: setup ## ratios to peers, all in one run (10 M entries; ENTRIES=n for fewer)
	@$(BIN)/python tests/bench/bench.py

bench-peers: setup .venv/peers/ready ## our server and its peers asked the same questions, in one run (ENTRIES=n ROUNDS=n)
	@PEERS_BIN=$(CURDIR)/.venv/peers/bin $(BIN)/python tests/bench/bench_peers.py

bench-scale: setup ## what ten times the entries, 10,000 files and 100,000 records cost (ENTRIES=n FILES=n RECORDS=n)
	@$(BIN)/python tests/bench/bench_scale.py

bench-tpch: setup ## TPC-H at our server and at DataFusion in process, in one run (SCALE=n)
	@$(BIN)/python tests/bench/bench_tpch.py

.venv/peers/ready: .ci/peers.txt
	@echo "setting up the peers in .venv/peers"
	@$(PYTHON) -m venv --clear .venv/peers
	@.venv/peers/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .ci/peers.txt
	@touch $@

faults: setup ## kill the server at every point of a commit and at random, and look what is left (SEED=1 KILLS=300)
	@$(BIN)/python tests/faults/faults.py --seed $(SEED) --kills $(KILLS)

dist: setup ## build the wheel into dist/
	@$(BIN)/python -m build --no-isolation --wheel --outdir dist . >/dev/null && ls dist/*.whl

lock: setup ## pin the newest allowed dependencies, with hashes
	@$(BIN)/python -m pip install --quiet pip-tools
	@$(BIN)/pip-compile --quiet --upgrade --generate-hashes --allow-unsafe --strip-extras --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-header --no-annotate --extra dev --output-file .ci/requirements.txt pyproject.toml

clean: ## remove .venv, caches and demo data
	@rm -rf .venv .demo dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
