# Every target installs what it needs by `make venv`, which is the only way to install.
#   EXTRA=cuda make venv     on a machine with GPUs
PYTHON ?= python3.11
EXTRA ?= cpu
VENV := .venv
BIN := $(VENV)/bin
# The CPU build of torch comes from the folder in PIP_FIND_LINKS if that is set, and else from PyTorch's CPU index.
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
# Tests that share a service or an engine run in the same process (tests/integration/conftest.py).
INTEGRATION := $(BIN)/python -m pytest tests/integration -q -n 2 --durations 12

.PHONY: help venv docs demo demo-models study bench test test-all $(TOPICS:%=test-%) test-faults fuzz unit integration
.PHONY: demo-cluster test-node-faults verify-node-faults test-clients test-crd test-cuda lint format clean

help:
	@echo "make demo         launch the service, train against it, and compare the drafters; writes report/"
	@echo "make demo-cluster launch on two Ray nodes, train, and kill a node; writes report/cluster"
	@echo "make test         check style and types, run unit and integration tests, and list the twelve slowest of each"
	@echo "make test-all     the same, and also the tests that repeat a promise for another kind or size"
	@echo "make test-TOPIC   run the tests of one topic: $(TOPICS)"
	@echo "make test-faults  train through $(FAULTS) random faults (34 minutes on 2 cores; FAULTS=20 for fewer)"
	@echo "make test-node-faults the same on three Ray nodes, which die, freeze and are cut off; needs root"
	@echo "make verify-node-faults counts again what the kept record of 100 such faults holds"
	@echo "make test-clients run openai, TRL, verifiers, prime-rl, SkyRL and NeMo-Gym against a service; installs them at first"
	@echo "make test-crd     hold deploy/cluster/kuberay.yaml to KubeRay's own schema; downloads it at first"
	@echo "make test-cuda    test the CUDA path without a GPU; needs Python 3.12, and keeps 6 GB in .cuda"
	@echo "make fuzz         send random bad requests to a service: schemathesis and 10,000 of our own (20 minutes)"
	@echo "make demo-models  train the demo's two policies and their drafters from scratch (hours)"
	@echo "make study        compare drafters by draft length and training data, also during training; writes report/study"
	@echo "make bench        measure the service and its parts against goals (over an hour); writes deploy/bench/results"
	@echo "make docs         write docs/reference, docs/rooms.svg and docs/llms.txt, and build the site into site/"
	@echo "make venv         install into $(VENV), and do nothing else"

venv: $(VENV)/.installed

# Bytecode is compiled once: vLLM's modules take 8 s to import, and 15 s if every process compiles them again.
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
	$(BIN)/python deploy/demo/recipe/make_models.py --family latent_moe --output deploy/demo/models/latent \
		--router-coefficient 0.01

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

# pytest exits with 5 if a topic has no tests of one kind.
$(TOPICS:%=test-%): test-%: venv
	$(UNIT) -m $* || test $$? = 5
	$(INTEGRATION) -m $* || test $$? = 5

test-faults: venv
	$(BIN)/python -m pytest tests/integration/faults -q -s -k "not nodes and not head" --faults $(FAULTS) --faults-within 100000

test-node-faults: venv
	mkdir -p report
	$(BIN)/python -m pytest tests/integration/faults -q -s -k nodes --faults $(FAULTS) --faults-within 100000 \
		--faults-record report/node-faults.json.gz

# The record of a whole run is kept. This counts its groups again, from what service and trainer wrote down.
verify-node-faults: venv
	$(BIN)/python tests/integration/faults/record.py tests/integration/faults/results/nodes.json.gz

demo-cluster: venv
	$(BIN)/python deploy/demo/cluster.py

# Each client has an environment of its own under .clients, which is made at the first run.
test-clients: venv
	$(BIN)/python tests/clients/run.py

# KubeRay's schema is a megabyte, so it is no part of this repository.
CRD := .cluster/ray.io_rayclusters.yaml

test-crd: $(CRD) | venv
	KUBERAY_CRD=$(CRD) $(BIN)/python -m pytest tests/unit/test_cluster_files.py -q -k own_schema

$(CRD):
	curl -fsSL --create-dirs -o $@ \
		https://raw.githubusercontent.com/ray-project/kuberay/v1.7.0/ray-operator/config/crd/bases/$(@F)

# The CUDA path without a GPU: the packages of a GPU machine, with the bundle of deploy/gpu unpacked over them, and a
# stand-in for the libraries of the driver. All of it stays in .cuda between runs.
CUDA := .cuda
CUDA_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python) python3.12)

test-cuda: $(CUDA)/site/ready $(CUDA)/libcuda.so.1 $(CUDA)/libnvidia-ml.so.1
	PYTHONPATH=$(CURDIR)/$(CUDA)/site:$(CURDIR) LD_LIBRARY_PATH=$(CURDIR)/$(CUDA) $(CUDA)/venv/bin/python -m pytest \
		-c tests/cuda/pytest.ini tests/cuda -q --durations 12

$(CUDA)/venv/.installed: tests/cuda/machine.txt | venv
	@echo "Installing into $(CUDA)/venv (some 5 GB of packages the first time) ..."
	$(BIN)/uv venv --quiet --clear --seed --python $(CUDA_PYTHON) $(CUDA)/venv
	$(BIN)/uv pip install --quiet --python $(CUDA)/venv/bin/python --requirement $<
	@touch $@

$(CUDA)/bundle/vllm.tar.xz: deploy/gpu/make_bundle.sh deploy/gpu/strip_cubins.py deploy/gpu/wheels.txt
	@echo "Making the bundle of deploy/gpu in $(CUDA)/bundle (one to three minutes) ..."
	bash deploy/gpu/make_bundle.sh $(CUDA)/bundle

# Without stages, call.sh only unpacks the bundle.
$(CUDA)/site/ready: $(CUDA)/bundle/vllm.tar.xz $(CUDA)/venv/.installed deploy/gpu/call.sh
	rm -rf $(CUDA)/site
	BUNDLE=$(CUDA)/bundle SITE=$(CUDA)/site OUT=$(CUDA)/logs PYTHON=$(CUDA)/venv/bin/python bash deploy/gpu/call.sh

$(CUDA)/libcuda.so.1 $(CUDA)/libnvidia-ml.so.1: tests/cuda/nvidia.c
	@mkdir -p $(CUDA)
	cc -shared -fPIC -o $@ $<

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
	rm -rf $(VENV) report runs
