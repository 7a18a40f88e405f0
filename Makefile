PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-fast export lint check notebooks docs site-test recheck clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

venv: $(STAMP)  ## build .venv (again when settings.ini, setup.py or constraints.txt changed)

# torch comes first and alone: pip's own settings decide which build, and nothing replaces it later.
$(STAMP): settings.ini setup.py constraints.txt
	@test -x $(BIN)/pip || $(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and \
		'Python 3.10 or newer is needed, for example: make test PYTHON=python3.12')"
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt torch
	$(BIN)/pip install -c constraints.txt -e ".[data,train,plots,dev]"
	@touch $@

demo: $(STAMP)  ## train and compare all variants on the toy task, into results/demo
	$(BIN)/latent-grpo demo --out results/demo

test: $(STAMP)  ## run every test, notebooks included, on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-fast: $(STAMP)  ## run the tests that are not marked slow
	$(BIN)/python -m pytest -q -m "not slow"

export: $(STAMP)  ## write latent_grpo/ from nbs/ and clean the notebooks
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

lint: $(STAMP)  ## names without a definition, imports without use, and the like (ruff)
	$(BIN)/ruff check

check: lint export  ## lint; fail when export or clean change or add a file
	git --no-pager diff --exit-code
	@new=$$(git ls-files --others --exclude-standard nbs latent_grpo); \
		test -z "$$new" || { echo "not in git: $$new"; exit 1; }

notebooks: $(STAMP)  ## run the notebooks in place to refresh their outputs (NBS="nbs/01_tasks.ipynb")
	$(BIN)/python docs/execute.py $(NBS)
	$(BIN)/nbdev_clean

docs: $(STAMP)  ## build the site into _docs from freshly run notebooks
	$(BIN)/pip install -q -c constraints.txt -e ".[docs]"
	$(BIN)/python docs/build.py

site-test: $(STAMP)  ## look at the built site in Chromium; screenshots of every page in _screens
	SITE_TEST=1 $(BIN)/python -m pytest -q -n 2 -m site tests/test_site.py

recheck: $(STAMP)  ## run three random rows of the verdicts again, one seed each
	OMP_NUM_THREADS=1 $(BIN)/python docs/recheck.py

clean:  ## remove everything that can be made again, .venv excepted
	rm -rf build dist *.egg-info _proc _executed _docs _screens .pytest_cache .hypothesis
	find nbs latent_grpo tests docs -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
