# What people do with PushUp from a clone. `make` alone lists it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 3

.PHONY: help run cluster test check format docs docs-serve chaos fuzz bench attack build clean

help:
	@echo "make run     a node on http://127.0.0.1:8080 with the demo page (ARGS='--help' shows the settings)"
	@echo "make cluster four nodes over Redis behind HAProxy, with the example application; more by python -m cluster"
	@echo "make test    all tests, after installing what they need (WORKERS=1: one after the other)"
	@echo "make check   types, lint, format"
	@echo "make format  put the code into its form"
	@echo "make docs    the documentation site, in site/ (make docs-serve: at http://127.0.0.1:8000, anew with every change)"
	@echo "make chaos   every fault against a real cluster, write tests/chaos/REPORT.md"
	@echo "make fuzz    odd bytes to the lane until Ctrl-C (TARGET=parsers, ARGS='-max_total_time=60'); see tests/fuzz"
	@echo "make bench   measure everything, against Nchan and Pushpin too (two hours), write loadtest/REPORT.md"
	@echo "make attack  measure good clients while 12,000 others attack, write loadtest/ATTACK.md"
	@echo "make build   the wheel, in dist/"

run: $(VENV)/.run
	$(BIN)/pushup serve --demo $(ARGS)

cluster: $(VENV)/.dev
	tests/install-debian.sh haproxy redis-server
	$(BIN)/python -m cluster up --nodes 4 --example $(ARGS)

test: $(VENV)/.dev
	tests/install-debian.sh chromium chromium-driver curl fish haproxy libjemalloc2 openssl redis-server zsh
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

docs-serve: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve --dev-addr 127.0.0.1:8000 $(ARGS)

chaos: $(VENV)/.dev
	tests/install-debian.sh haproxy redis-server
	$(BIN)/python -m tests.chaos $(ARGS)

TARGET ?= lane
fuzz: $(VENV)/.dev
	mkdir -p tests/fuzz/findings/$(TARGET)
	@echo "Findings go to tests/fuzz/findings."
	$(BIN)/python -m tests.fuzz $(TARGET) -max_len=2048 -artifact_prefix=tests/fuzz/findings/ $(ARGS) \
		tests/fuzz/findings/$(TARGET) tests/fuzz/corpus/$(TARGET)

bench: $(VENV)/.dev
	tests/install-debian.sh haproxy libjemalloc2 libnginx-mod-nchan nginx pushpin redis-server redis-tools
	$(BIN)/python -m loadtest run --all; status=$$?; $(BIN)/python -m loadtest report && exit $$status

attack: $(VENV)/.dev
	$(BIN)/python -m loadtest attack $(ARGS)

build: $(VENV)/.dev
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# A virtual environment needs Python 3.11 and its venv module, which Debian and Ubuntu ship apart.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "PushUp needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || tests/install-debian.sh python3-venv
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --group dev
	@touch $@
