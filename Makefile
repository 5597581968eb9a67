# make report       quick profile of the main experiments, and the report from them
# make report-all   quick profile of every experiment, and the report from them
# make test         the notebooks' own tests, then pytest
# make check        is the package what the notebooks export, are they clean, lint
# make peers        pythae in its own environment, for the comparisons in benchmarks/ (SHARE_TORCH=1: without a second torch)
# make lab          JupyterLab
# make clean        remove the environment and caches; results, runs and data stay

PYTHON ?= python3
PROFILE ?= quick
MAIN ?= experiments/capacity.ipynb experiments/fashion_mnist.ipynb
EXPERIMENTS = $(wildcard experiments/*.ipynb)
BIN := .venv/bin
STAMP := .venv/installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env report report-all test peers lab check clean

help:
	@sed -n 's/^# \(make.*\)/\1/p' Makefile

# ---- the environment: made once, brought up to date when pyproject.toml changes ----
env: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1 || true); vae_nb needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev]'
	touch $@

# data sets that lie beside the clone are used where there are any; else they are downloaded
ifneq ($(wildcard ../shared/data),)
report report-all test: export VAE_NB_DATA ?= $(abspath ../shared/data)
endif

# ---- the report ----
# `vae-nb run` prints the folder of the run, so that it can be promoted
run_and_promote = run=$$($(BIN)/vae-nb run $(1) --profile $(PROFILE)) && $(BIN)/vae-nb promote "$$run"
render = files=$$($(BIN)/vae-nb report) && printf '\nThe report is rendered:\n' && printf '  %s\n' $$files

report: $(STAMP)
	@for nb in $(MAIN); do $(call run_and_promote,$$nb) || exit 1; done
	@$(render)

report-all: $(STAMP)
	@for nb in $(EXPERIMENTS); do $(call run_and_promote,$$nb) || exit 1; done
	@$(render)

# ---- tests ----
test: export OMP_NUM_THREADS ?= 1
test: $(STAMP)
	$(BIN)/nbdev-test --n-workers 2
	$(BIN)/python -m pytest -n 2 --dist loadfile

# ---- other libraries, to compare with ----
peers: $(STAMP)
	$(BIN)/python benchmarks/peers/environment.py $(if $(SHARE_TORCH),--share-torch)

lab: $(STAMP)
	$(BIN)/jupyter lab

# ---- hygiene ----
# the notebooks are exported and cleaned in a copy, so a failing check leaves the tree as it was
check: $(STAMP)
	@set -e; root=$$PWD; dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; \
	cp -R nbs vae_nb pyproject.toml settings.ini README.md "$$dir"; cd "$$dir"; \
	find vae_nb -name '*.py' ! -path vae_nb/__init__.py -delete; \
	"$$root"/$(BIN)/nbdev-export; "$$root"/$(BIN)/nbdev-clean; \
	diff -r -x __pycache__ -x .ipynb_checkpoints -x '*.pyc' "$$root/vae_nb" vae_nb \
	  || { echo "vae_nb/ is not what the notebooks export: run nbdev-export, and remove modules that no notebook exports." >&2; exit 1; }; \
	diff -rq -x .ipynb_checkpoints -x __pycache__ "$$root/nbs" nbs || { echo "These notebooks are not clean: run nbdev-clean." >&2; exit 1; }; \
	echo "The package is what the notebooks export, and they are clean."
	$(BIN)/ruff check vae_nb --isolated --select F821,F811 --per-file-ignores 'vae_nb/studies/dispatch.py:F811,vae_nb/studies/clusters.py:F811'
	$(BIN)/ruff check nbs experiments tests

clean:
	rm -rf .venv benchmarks/peers/.venv .ruff_cache .pytest_cache *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
