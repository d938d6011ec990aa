# Every target works on a fresh clone: `make demo`, `make test`. Two cores and no GPU are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: venv sglang rivals demo test soak check bench clean

venv: $(VENV)/.installed

# A stamp file: the environment is made once and reused until the pins or the dependencies change.
$(VENV)/.installed: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# SGLang on a machine without a GPU; with one: pip install 'kdpipe[sglang]'.
sglang: $(VENV)/.sglang

$(VENV)/.sglang: $(VENV)/.installed tools/sglang-cpu/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r tools/sglang-cpu/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps tools/sglang-cpu/placeholders
	touch $@

# What tests and benchmarks measure against; after SGLang, so that what both need is there in SGLang's versions.
rivals: $(VENV)/.rivals

$(VENV)/.rivals: $(VENV)/.sglang
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[rivals]'
	touch $@

demo: venv
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/demo/run.py --out .demo

test: venv sglang rivals
	$(BIN)/python -m pytest

# The long tests: large sizes, thousands of kills.
soak: venv sglang rivals
	$(BIN)/python -m pytest -m slow

check: venv
	PATH="$(CURDIR)/$(BIN):$$PATH" tools/check

bench: venv sglang rivals
	for bench in tools/bench/[a-z]*.py; do $(BIN)/python $$bench --quick --json || exit 1; done

clean:
	rm -rf $(VENV) .demo build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
