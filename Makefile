# The two commands of the README are `make demo` and `make test`; each sets up what it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: help setup demo test test-all test-faults test-fuzz test-t5x lint format parity-setup t5x-setup precompile-setup clean
.PHONY: docs docs-serve notebooks notebooks-setup
.PHONY: table-single table-multilingual table-multitask table-ablations

FUZZ_SECONDS ?= 300
FUZZ_SEED ?= 0

# Of the tables: SCALE is laptop, paper or paper-SIZE; the same command goes on after a stop.
SCALE ?= laptop
WORKERS ?= 1
TABLES ?= runs/tables/$(SCALE)

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup: $(READY)  ## make .venv and install the requirements

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"error: Python 3.11 to 3.13 is needed, $(PYTHON) is {v[0]}.{v[1]}; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check --progress-bar on -r requirements.txt
	$(PY) -m pip install --disable-pip-version-check -q --no-deps -e .
	@touch $@

demo: $(READY)  ## fine-tune SmolLM2-135M with LoRA and SiRA on real data and print a table
	@$(PY) scripts/demo.py

test: $(READY)  ## lint and the test suite (under 10 minutes on 2 cores)
	@$(MAKE) --no-print-directory lint
	@$(PY) -m pytest -n 2 -m "not slow and not parity and not faults and not fuzz"

test-all: notebooks-setup  ## everything, the slow checks and notebooks too; parity checks run where torch is installed
	@$(MAKE) --no-print-directory lint
	@$(PY) -m pytest -n 2 -m "not faults and not fuzz"

test-faults: $(READY)  ## kill runs, fill disks, damage checkpoints: docs/reliability.md; FAULTS_ROUNDS=20 FAULTS_SEED=0
	@$(PY) -m pytest -n 0 -v -m faults tests/faults

test-fuzz: $(READY)  ## damage files of every format at random for FUZZ_SECONDS, and read them
	@FUZZ_SECONDS=$(FUZZ_SECONDS) FUZZ_SEED=$(FUZZ_SEED) $(PY) -m pytest -n 0 -m fuzz -s tests/fuzz

parity-setup: $(READY)  ## install torch (CPU) and transformers, for the parity tests
	$(PY) -m pip install --disable-pip-version-check -q -e '.[parity]'

docs: $(READY)  ## build the documentation's site into site/; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

docs-serve: $(READY)  ## show the site at http://127.0.0.1:8000, built anew when a page changes
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs serve --watch CHANGELOG.md --watch scripts/docs

notebooks-setup: $(READY)  ## install what runs the notebooks of docs/notebooks
	@$(PY) -m pip install --disable-pip-version-check -q -e '.[notebooks]'

notebooks: notebooks-setup  ## run the notebooks and keep what they print and draw; minutes
	@$(PY) scripts/docs/run_notebooks.py

t5x-setup: $(READY)  ## install what T5X imports from PyPI; T5X itself is not there, see docs/t5x.md
	$(PY) -m pip install --disable-pip-version-check -q -e '.[t5x]'

test-t5x: t5x-setup  ## the tests with T5X: T5X_PATH= and AIRIO_PATH= are clones
	@REQUIRE_T5X=1 PYTHONPATH="$(abspath $(T5X_PATH)):$(abspath $(AIRIO_PATH)):$$PYTHONPATH" $(PY) -m pytest -n 1 tests/t5x

table-single: $(READY)  ## a method on one task, all cells and seeds: docs/experiments.md has the times
	@$(call make_table,single)

table-multilingual: $(READY)  ## a method on several languages at once
	@$(call make_table,multilingual)

table-multitask: $(READY)  ## a method on several tasks at once
	@$(call make_table,multitask)

table-ablations: $(READY)  ## k, capacity, LoRA's rank, the regulariser
	@$(call make_table,ablations)

# Runs that failed leave gaps with their reasons in the table; a stop or a mistake (any other status) ends here.
define make_table
	[ "$(SCALE)" != laptop ] || $(PY) scripts/download_data.py smollm2-135m bfcl; \
	$(PY) scripts/sweep.py --sweep=configs/sweeps/table_$(1).py:$(SCALE) --workdir=$(TABLES)/$(1) --workers=$(WORKERS) $(ARGS); \
	status=$$?; [ $$status -le 1 ] || exit $$status; \
	$(PY) scripts/make_tables.py --kind=$(1) --runs=$(TABLES)/$(1) --out=$(TABLES)/$(1)/report && exit $$status
endef

# Beside the environment and not in it: with libtpu among its packages, every program would look for TPUs first.
precompile-setup: $(READY)  ## fetch libtpu into .libtpu, for scripts/precompile.py (the version that jax[tpu] names)
	$(PY) -m pip install --disable-pip-version-check -q --no-deps --upgrade --target .libtpu 'libtpu==0.0.42.*'

lint: $(READY)  ## ruff check and ruff format --check
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

format: $(READY)  ## reformat and apply the safe fixes
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

clean:  ## delete caches and run directories (not .venv)
	rm -rf .pytest_cache .ruff_cache .hypothesis runs build site *.egg-info
