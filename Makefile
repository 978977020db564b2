# `make` lists what there is. Every target sets up .venv first where that is missing or out of date.
.DEFAULT_GOAL := help
.PHONY: help setup train serve test soak bench bench-serve results lint doctor lock

PYTHON ?= python3
VENV := .venv/bin/python
PYTEST := $(VENV) -m pytest -p no:cacheprovider -rs --durations=15

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  ARGS="..." is passed on: make train ARGS="train.epochs=2", make test ARGS="tests/data"'

setup: ## Create .venv with the pinned stack (nothing is done where it is up to date)
	@$(PYTHON) jobs/install.py

train: setup ## Prepare MovieLens-100K and train a DHEN on it with 2 Ray Train workers
	$(VENV) jobs/train.py experiment=movielens trainer=ray $(ARGS)

# Each is made once; delete it to have it made anew.
runs/served/%/bundle/manifest.json: | setup
	$(VENV) jobs/train.py experiment=movielens_$* runs_folder=runs/served run_id=$* resume=auto

releases/movielens/manifest.json: $(foreach stage,retriever early final,runs/served/$(stage)/bundle/manifest.json)
	$(VENV) jobs/release.py retriever=runs/served/retriever early_ranker=runs/served/early final_ranker=runs/served/final \
	    output=releases/movielens users=stores/movielens graph='{clusters: 32, width: 50}'

serve: setup releases/movielens/manifest.json ## Train the three stages of a cascade on MovieLens-100K, once, and serve them at http://127.0.0.1:8000
	$(VENV) jobs/deploy.py serve.releases='{movielens: releases/movielens}' serve.traffic='{movielens: 1.0}' \
	    serve.cascade.users=stores/movielens serve.bandit='{folder: logs/bandit}' $(ARGS)

test: setup ## Run the test suite
	$(PYTEST) $(ARGS)

soak: setup ## Run the tests that train or kill things, and write a record to docs/records/
	$(PYTEST) -m "experiment or soak" --timeout 3600 --record=docs/records $(ARGS)

bench: setup ## Measure throughput against the bare loop
	$(VENV) jobs/bench.py $(ARGS)

bench-serve: setup releases/movielens/manifest.json ## Measure what `make serve` serves: latency, throughput, overload, killed replicas, swaps
	$(VENV) jobs/bench_serve.py $(ARGS)

results: setup ## Train what the comparison of models lacks and write docs/results.md
	$(VENV) jobs/compare.py $(ARGS)

lint: setup ## Check style and types
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	$(VENV) -m mypy

doctor: setup ## Tell about this machine, and how to mend what is wrong
	@$(VENV) -m raysys.doctor

lock: ## Resolve the dependencies anew and write constraints.txt
	@$(PYTHON) jobs/install.py --lock
