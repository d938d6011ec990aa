# Every target works on a fresh clone: `make demo`, `make test`. Two cores and no GPU are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# No page of warnings at each step: what is installed beside SGLang is checked once, by `rivals`.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts

.PHONY: venv sglang rivals demo test soak check mutate bench clean

venv: $(VENV)/.installed

# A stamp file: the environment is made once and reused until the pins or the dependencies change.
$(VENV)/.installed: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[dev]'
	touch $@

# SGLang on a machine without a GPU; with one: pip install 'kdpipe[sglang]'.
sglang: $(VENV)/.sglang

$(VENV)/.sglang: $(VENV)/.installed tools/sglang-cpu/requirements.txt
	$(PIP) --no-deps -r tools/sglang-cpu/requirements.txt
	$(PIP) --no-deps tools/sglang-cpu/placeholders
	touch $@

# What tests and benchmarks measure against; after SGLang, so that what both need is there in SGLang's versions.
rivals: $(VENV)/.rivals

$(VENV)/.rivals: $(VENV)/.sglang
	$(PIP) -c constraints.txt -e '.[rivals]'
	@# What SGLang lists beyond its own requirements.txt here is for GPUs and servers. Any other gap is shown, and an error.
	@! $(BIN)/python -m pip check --disable-pip-version-check | grep -v -e '^sglang ' -e '^No broken requirements'
	@echo "SGLang is installed for the CPU, without the packages that it wants for GPUs and servers: the tests need none."
	touch $@

demo: venv
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/demo/run.py --out .demo

# WORKERS=8: eight. Each has one thread; the tests of a file share a worker, and so what the file builds once.
WORKERS ?= 2

test: venv sglang rivals
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# The long tests: large sizes, thousands of kills.
soak: venv sglang rivals
	$(BIN)/python -m pytest -m slow

check: venv
	PATH="$(CURDIR)/$(BIN):$$PATH" tools/check

# Faults put into a copy one at a time: which does no test notice? ONLY="schedule clip": those with these words in them.
mutate: venv sglang rivals
	$(BIN)/python tools/mutate.py $(ONLY)

bench: venv sglang rivals
	for bench in tools/bench/[a-z]*.py; do $(BIN)/python $$bench --quick --json || exit 1; done

clean:
	rm -rf $(VENV) .demo build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
