# `make demo` and `make test` do all the set-up they need; there is one way to install, `make venv`.
#   EXTRA=cuda make venv     on a machine with GPUs
PYTHON ?= python3.11
EXTRA ?= cpu
VENV := .venv
BIN := $(VENV)/bin
# The CPU build of torch: from the folder in PIP_FIND_LINKS where that is set, else from PyTorch's own CPU index.
ifeq ($(EXTRA),cpu)
ifdef PIP_FIND_LINKS
TORCH_FROM := --find-links $(PIP_FIND_LINKS)
else
TORCH_FROM := --torch-backend cpu
endif
endif

FAULTS ?= 100
TOPICS := lossless drafters queue weights http fleet engine trainer losses tasks config documents
UNIT := $(BIN)/python -m pytest tests/unit -q -n 2 --durations 12
# One process: an engine keeps two cores busy by itself.
INTEGRATION := $(BIN)/python -m pytest tests/integration -q --durations 12

.PHONY: help venv docs demo demo-models study bench test test-all $(TOPICS:%=test-%) test-faults fuzz unit integration
.PHONY: lint format clean

help:
	@echo "make demo         launch the service, train against it, compare the drafters; writes report/"
	@echo "make test         linting, types, unit and integration tests; the slowest twelve of each"
	@echo "make test-all     these, and the tests that repeat a promise for another kind or size"
	@echo "make test-TOPIC   the tests of one topic: $(TOPICS)"
	@echo "make test-faults  a training run with $(FAULTS) random faults (34 minutes on 2 cores; FAULTS=20 for fewer)"
	@echo "make fuzz         schemathesis and 10,000 random bad requests against a service (20 minutes)"
	@echo "make demo-models  train the demo's policy and drafters from nothing (under an hour)"
	@echo "make study        drafters by draft length and by training data, and with a policy that moves; writes report/study"
	@echo "make bench        speed of the service and its parts against goals (over an hour); writes deploy/bench/results"
	@echo "make docs         write docs/reference, docs/rooms.svg and docs/llms.txt, and build the site into site/"
	@echo "make venv         only install, into $(VENV)"

venv: $(VENV)/.installed

# Compiled once: vLLM's modules take 8 s to import, and 15 s where every process compiles them again.
$(VENV)/.installed: pyproject.toml deploy/overrides.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet uv
	@echo "Installing into $(VENV) (some 2 GB of packages the first time) ..."
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --override deploy/overrides.txt $(TORCH_FROM) --editable ".[$(EXTRA),dev]"
	@touch $@

demo: venv
	@deploy/demo/run.sh

demo-models: venv
	$(BIN)/python deploy/demo/recipe/make_models.py

# What Material prints about the next MkDocs is no news of this site.
docs: venv
	PYTHONPATH=docs $(BIN)/python -m generate
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

study: venv
	$(BIN)/python deploy/demo/study/run.py --config deploy/demo/study/study.toml

bench: venv
	$(BIN)/python deploy/bench/bench.py

test: lint unit integration

test-all: lint unit
	$(INTEGRATION)

unit: venv
	$(UNIT)

integration: venv
	$(INTEGRATION) -m "not again"

# pytest exits with 5 where a topic has no test of the kind.
$(TOPICS:%=test-%): test-%: venv
	$(UNIT) -m $* || test $$? = 5
	$(INTEGRATION) -m $* || test $$? = 5

test-faults: venv
	$(BIN)/python -m pytest tests/integration/faults -q -s --faults $(FAULTS) --faults-within 100000

fuzz: venv
	$(BIN)/python tests/fuzz/run.py --seconds 600
	$(BIN)/python -m pytest tests/integration/faults/test_bad_requests.py -q -s --bad-requests 10000

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) report runs site
