# Herald. `make` prints this help.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
VIEWER := webui/static/vendor/niivue.js

.PHONY: help setup tools viewer demo test faults lint kafka models train clean

help:  ## Print this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/installed  ## Create .venv and install Herald into it

$(VENV)/installed: pyproject.toml deploy/setup-venv.sh
	bash deploy/setup-venv.sh $(VENV) $(PYTHON)
	touch $@

models: setup  ## Export the trained models as SavedModels, where `herald run` looks for them
	$(BIN)/python -m serving.export

viewer: $(VIEWER)  ## Fetch the volume viewer of the series page from npm, by its lock file

$(VIEWER): deploy/viewer/package-lock.json deploy/viewer/build.sh
	bash deploy/setup-node.sh
	bash deploy/viewer/build.sh

demo: models  ## Run the whole node, send it two simulated head CT studies, show triage, page and review URL
	@$(MAKE) -s viewer || echo "The volume viewer could not be built (see above): the series page shows PNG slices."
	$(BIN)/herald demo

tools: setup  ## Install what the tests need beside Python: Kafka's Java, PostgreSQL, Chromium, dcmtk
	bash deploy/setup-tools.sh $(BIN)/playwright

test: models tools viewer  ## Set everything up and pass the whole test suite
	$(BIN)/pytest

faults: tools  ## The long versions of the fault injection and the fuzzing of the receiver (a quarter of an hour)
	HERALD_FAULTS=long $(BIN)/pytest -s tests/test_receiver_faults.py tests/test_receiver_fuzz.py tests/test_receiver_input.py

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

kafka: tools  ## Run a real Kafka broker on 127.0.0.1:9092 (Ctrl-C stops it)
	$(BIN)/python deploy/kafka/broker.py run

train: setup  ## Train both models from their seeds (reads ../shared/data)
	$(BIN)/python -m serving.train protocol
	$(BIN)/python -m serving.train hemorrhage --pretrain
	$(BIN)/python -m serving.train hemorrhage --fold 0 1 2 3 4
	$(BIN)/python -m serving.train hemorrhage --evaluate --all

clean:  ## Remove what make made, but not data
	rm -rf $(VENV) herald-data/models .kafka build *.egg-info webui/static/vendor deploy/viewer/node_modules
