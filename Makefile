# Two commands on a fresh machine: `make train` and `make test`.
PYTHON ?= python3
# Each lock has an environment of its own: requirements.txt is the oldest releases that are tested,
# for Python 3.11, and requirements-newest.txt the newest, for later ones.
LOCK := $(shell $(PYTHON) -c 'import sys; print("requirements%s.txt" % \
	("-newest" if sys.version_info >= (3, 12) else ""))' 2>/dev/null || echo requirements.txt)
VENV := $(if $(findstring newest,$(LOCK)),.venv-newest,.venv)
BIN := $(VENV)/bin
# A Python for the newest releases: one that runs and can make an environment.
NEWEST ?= $(shell for python in python3.13 \
	"$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.13.*/bin/python3.13 python3.14 python3.12; do \
	"$$python" -c 'import ctypes, ensurepip, ssl, venv' >/dev/null 2>&1 && echo "$$python" && break; \
	done)
PIP := -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet
PARITY := .venv-parity
DOCS := .venv-docs
TPU := .venv-tpu
GPU := .venv-gpu
WHEEL := .venv-wheel
WORKDIR ?= runs/emoji
COMPILE ?=
FAULTS ?=
BENCH ?= training encoding gradcache step_parts loss tokenizer load

.DEFAULT_GOAL := help
.PHONY: help install newest-python train test test-newest test-slow wheel-check parity lint format faults bench compile-tpu compile-gpu docs clean

help: ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The locked environment; made again when the lock or the package's metadata changes.
$(VENV)/.installed: $(LOCK) setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python $(INSTALL) -r $(LOCK)
	$(BIN)/python $(PIP) uninstall --quiet --yes clip-jax
	$(BIN)/python $(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

install: $(VENV)/.installed ## make the environment: .venv, or .venv-newest for a PYTHON of 3.12 or later

newest-python: ## print the Python that `make test-newest` takes, if there is one
	@echo $(NEWEST)

data/emoji/classnames.txt: | $(VENV)/.installed
	$(BIN)/python -m clip_jax.data.emoji --out data/emoji --held-out Appl

data/emoji/tokenizer.model: data/emoji/classnames.txt | $(VENV)/.installed
	$(BIN)/python -m clip_jax.tokenizers.train --captions $< --out $@ --model-type bpe --vocab-size 2000

train: data/emoji/tokenizer.model ## install, then train on the emoji set and evaluate (WORKDIR=runs/emoji)
	$(BIN)/python -m clip_jax.main --config experiments/emoji.py --workdir $(WORKDIR)

test: $(VENV)/.installed ## install, then run the tests
	$(BIN)/python -m pytest -m "not slow" -n logical --maxprocesses 8 --dist worksteal

test-newest: ## the checks and the tests on the newest releases, in .venv-newest (NEWEST=python3.13)
	@test -n "$(NEWEST)" || { echo "no Python 3.13 here; name one: make test-newest NEWEST=PATH"; exit 1; }
	$(MAKE) lint test PYTHON=$(NEWEST)

test-slow: $(VENV)/.installed ## the tests that take longer
	$(BIN)/python -m pytest -m slow

# The reference libraries live in an environment of their own. PyTorch's CPU build where the index has
# one; torchvision and the others without their own dependencies.
$(PARITY)/.installed: requirements.txt requirements-parity.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/python $(INSTALL) -r requirements.txt
	$(PARITY)/bin/python $(INSTALL) torch==2.13.0 scikit-learn transformers
	$(PARITY)/bin/python $(INSTALL) --no-deps -r requirements-parity.txt
	$(PARITY)/bin/python $(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

# Only the wheel is there, not the repository. The losses are those of `make train`'s first steps.
wheel-check: $(VENV)/.installed ## build the wheel, install it into a clean environment, train 20 steps by it
	rm -rf build dist $(WHEEL)
	$(BIN)/python $(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python $(INSTALL) -c $(LOCK) "$$(echo dist/*.whl)[demo]"
	mkdir -p $(WHEEL)/work && cd $(WHEEL)/work && ../bin/python -m clip_jax && \
	../bin/python -m clip_jax.doctor --folder . && \
	../bin/python -m clip_jax.data.emoji --out data/emoji --held-out Appl && \
	../bin/python -m clip_jax.tokenizers.train --captions data/emoji/classnames.txt \
		--out data/emoji/tokenizer.model --model-type bpe --vocab-size 2000 && \
	../bin/python -m clip_jax.main --config emoji --workdir run --config.train.steps=20 \
		--config.train.log_every=1 --config.eval.data=""
	rm -rf $(WHEEL)

parity: $(PARITY)/.installed ## install the reference libraries and compare with them
	$(PARITY)/bin/python -m pytest tests/parity

# The site: Sphinx beside the package, whose docstrings, flags and fields it reads.
$(DOCS)/.installed: $(LOCK) requirements-docs.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python $(INSTALL) -r $(LOCK)
	$(DOCS)/bin/python $(INSTALL) --no-deps -r requirements-docs.txt
	$(DOCS)/bin/python $(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

docs: $(DOCS)/.installed ## build the site into build/docs; a warning is an error
	JAX_PLATFORMS=cpu $(DOCS)/bin/python -m sphinx -q -W --keep-going docs build/docs
	@echo "build/docs/index.html"

lint: $(VENV)/.installed ## formatting, checks and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

faults: $(VENV)/.installed ## kill, damage and race runs, up to 40 minutes on 2 cores (FAULTS="--share 0.1 kills" for some)
	cd tests && PYTHONPATH=.. ../$(BIN)/python -m faults $(FAULTS)

bench: $(PARITY)/.installed ## measure against open_clip, about 15 minutes on 2 cores (BENCH="training loss" for some)
	@for name in $(BENCH); do $(PARITY)/bin/python -m benchmarks.$$name || exit 1; done

# XLA's compilers for devices that are not there, each in an environment of its own: 1.3 and 5 GB.
$(TPU)/.installed: EXTRA := jax[tpu]
$(GPU)/.installed: EXTRA := jax[cuda12]
$(TPU)/.installed $(GPU)/.installed: requirements.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(INSTALL) -r requirements.txt
	$(@D)/bin/python $(INSTALL) -c requirements.txt "$(EXTRA)"
	$(@D)/bin/python $(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

compile-tpu: $(TPU)/.installed ## compile programs for TPUs into docs/compiled.md, slow (COMPILE="b32-v5e" for some)
	$(TPU)/bin/python -m pytest tests/planning/test_compilers.py
	$(TPU)/bin/python -m benchmarks.compiled --platform tpu $(COMPILE)

compile-gpu: $(GPU)/.installed ## the same for NVIDIA GPUs
	$(GPU)/bin/python -m pytest tests/planning/test_compilers.py
	$(GPU)/bin/python -m benchmarks.compiled --platform cuda $(COMPILE)

clean: ## delete the environments, the data and the runs
	rm -rf .venv .venv-newest $(PARITY) $(TPU) $(GPU) $(WHEEL) data runs build dist *.egg-info
