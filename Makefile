# A machine with Python >= 3.10, make and pip is enough. Another interpreter: make demo PYTHON=python3.12
.DEFAULT_GOAL := help
.PHONY: help install demo test oldest lint bench docs clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NAME ?=
ARGS ?=
WORKERS ?= 2

help:  ## this list
	@echo "Serpette: fine-tuning made cheap by pruning."
	@sed -n 's/^\([a-z]*\):[^#]*## /  make \1 | /p' Makefile | column -t -s '|' 2>/dev/null || sed -n 's/^\([a-z]*\):.*## /  make \1: /p' Makefile

# The stamp is newer than what it was installed from, so the second time costs nothing.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Serpette needs Python >= 3.10; name one: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || { echo "==> making $(VENV) with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "no venv: install it (on Debian: apt install python3-venv) and try again"; exit 1; }; }
	@echo "==> installing serpette and what it needs into $(VENV) (once, about 3 minutes)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[zoo,dev]' -c constraints.txt
	@# An oracle of the tests. It declares torchvision, which it does not import and which breaks transformers here.
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps kronfluence einconv einops opt_einsum -c constraints.txt
	@touch $@

install: $(STAMP)  ## make .venv and install into it (the others do this by themselves)

demo: $(STAMP)  ## prune Fashion-MNIST, tune a real ViT on what is left; ends with the path of the report
	@echo "==> fetching what the demo needs (once, about 120 MB)"
	@$(BIN)/serpette fetch vit-s fashion-mnist
	@echo "==> running recipes/demo.yaml (under 10 minutes on 2 quiet cores; goes on where it stopped)"
	@$(BIN)/serpette run recipes/demo.yaml

test: $(STAMP)  ## the tests (some 10 minutes on 2 cores); some of them: make test ARGS="tests/test_cli.py"
	@echo "==> running the tests in $(WORKERS) processes"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

oldest: $(STAMP)  ## the tests of the row adapter with the oldest peft that it supports
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --upgrade --target $(VENV)/oldest peft==0.18.0
	@PYTHONPATH=$(CURDIR)/$(VENV)/oldest OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/rows $(ARGS)

lint: $(STAMP)  ## ruff, format, pyright, and that imports point one way
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "==> pyright"
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@echo "==> imports point one way"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_imports.py

bench: $(STAMP)  ## one benchmark: make bench NAME=dlc_speed
	@$(BIN)/serpette bench $(if $(NAME),$(NAME),--list) $(ARGS)

docs: $(STAMP)  ## the pages with the reference of the Python names; ends with the path of the first
	@echo "==> building the pages"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[docs]' -c constraints.txt
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo site/index.html

clean:  ## remove .venv, site and caches; runs/ and the zoo stay
	rm -rf $(VENV) site .pytest_cache .ruff_cache .hypothesis
