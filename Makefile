# Everything a clone needs, from Python 3.11 or newer, make and pip. `make` alone lists the verbs.

PYTHON     ?= python3
DEMO_FLAGS ?= --workers 4 --task digits --rule gem --budget-updates 1200
TEST_FLAGS ?=
# As many tests at one time as there are cores, each of which may start a server and several workers; those that wait for
# long lie side by side, so who has none left takes from the others.
PARALLEL   := -n auto --maxprocesses 4 --dist worksteal

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP   := $(BIN)/python -m pip --disable-pip-version-check
# Quiet, except for errors.
INSTALL := $(PIP) install -qq --constraint constraints.txt

.PHONY: help demo test check bench benchmarks slow fuzz rules papers clean

help:  ## list the verbs
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile

demo: $(STAMP)  ## a server and four workers on a small data set, in under a minute
	$(BIN)/paramserver launch $(DEMO_FLAGS)

test: $(STAMP)  ## all tests but the slow ones
	$(BIN)/python -m pytest $(PARALLEL) $(TEST_FLAGS)

check: $(STAMP)  ## format, lint, types, and the commands in the docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_docs.py

bench: $(STAMP)  ## time one exchange against the peers
	$(BIN)/python -m benchmarks roundtrip

benchmarks: $(STAMP)  ## all benchmarks of the data plane, into runs/benchmarks: half an hour
	for name in roundtrip apply codecs exchanges overhead scaling memory; do \
		$(BIN)/python -m benchmarks $$name --json runs/benchmarks/$$name.json || exit; done

slow: $(STAMP)  ## the slow tests only
	$(BIN)/python -m pytest -m slow $(TEST_FLAGS)

fuzz: $(STAMP)  ## 20,000 examples of bytes and of vectors for every codec: half an hour
	FUZZ_EXAMPLES=20000 $(BIN)/python -m pytest tests/unit/test_fuzz.py -k codecs --timeout 3600 $(PARALLEL) $(TEST_FLAGS)

rules: $(STAMP)  ## every rule with real processes, one worker killed, one late: 15 minutes
	@mkdir -p runs
	RULES_TABLE=runs/rules.jsonl $(BIN)/python -m pytest -m slow tests/integration/test_every_rule.py $(TEST_FLAGS)

papers: $(STAMP)  ## the papers' figures, simulated, from the data sets in DATA: hours
	@test -n "$(DATA)" || { echo "Say where the data sets are: make papers DATA=~/data (mnist/ in it)" >&2; exit 1; }
	for name in gem_figure1 gem_kappa; do \
		$(BIN)/python -m benchmarks $$name --data $(DATA) --keep runs/papers --json docs/figures/$$name.json || exit; done
	$(BIN)/python -m benchmarks bytes_to_accuracy --data $(DATA) --keep runs/papers --json docs/figures/bytes_to_accuracy.json
	for name in rules diversity; do $(BIN)/python -m benchmarks $$name --json docs/figures/$$name.json || exit; done

clean:  ## remove caches and build outputs; .venv and the outputs of runs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

# The stamp is written last: an interrupted install is done again, a finished one is not repeated until what it
# was made from changes. Torch goes first and alone, so that a build that lies on pip's find-links is the one taken.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, and '$(PYTHON)' is not. Try: make PYTHON=python3.11" >&2; exit 1; }
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV); the first time this takes a few minutes."
	@$(INSTALL) torch
	@$(INSTALL) --editable '.[dev]'
	@touch $@
