# `make train` and `make test` are all a fresh clone needs: Python >= 3.10 and pip.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

# One compile cache for everything that runs from here: its fixed part alone costs 19 s on 2 cores.
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/.cache/inductor

.PHONY: train test lint docs venv clean

train: $(STAMP)
	$(BIN)/python examples/train_gpt.py $(ARGS)

# OMP_NUM_THREADS=1: with contended cores, 2 OpenMP threads made an eager step 20x slower. Two processes, and each file in one
# of them, because the tests of a file share ranks and graphs. tests/conftest.py has the order: the longest files come first.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

# Guides, results and API reference as a static site in .cache/site; needs Python >= 3.11.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file examples/mkdocs.yml

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev,examples,docs]"
	touch $@

clean:
	rm -rf .venv .cache .hypothesis build dist runs *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
