# Everything is set up by `make venv`, which every other target needs; there is no second way to install.
PYTHON ?= python3.11
EXTRA ?= cpu
VENV := .venv
BIN := $(VENV)/bin
# The CPU build of torch: the folder in PIP_FIND_LINKS where that is set, else PyTorch's own index.
ifeq ($(EXTRA),cpu)
ifdef PIP_FIND_LINKS
TORCH_FROM := --find-links $(PIP_FIND_LINKS)
else
TORCH_FROM := --torch-backend cpu
endif
endif

.PHONY: venv
venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml deploy/overrides.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet uv
	@echo "Installing (some 2 GB of packages the first time) ..."
	@$(BIN)/uv pip install --python $(BIN)/python --override deploy/overrides.txt $(TORCH_FROM) --editable ".[$(EXTRA),dev]"
	@touch $@
