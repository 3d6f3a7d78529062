# Each target sets up what it needs. Arguments pass through: make quickstart ARGS="run.seed=1"
# Exit codes: make ends with 2 whenever a command fails, whatever the command's own code was.
PYTHON_IN_VENV := .venv/bin/python

.PHONY: help venv quickstart test check docs

help:
	@echo "make quickstart   distil the shipped toy pair across tokenizers, with a report (about two minutes)"
	@echo "make test         the tests (ARGS=\"-m slow\": the slow ones)"
	@echo "make check        lint, format, types, layers, shell scripts"
	@echo "make docs         these pages as a site in site/, links checked; it needs no network"
	@echo "make venv         only set up .venv (Python >= 3.12; name one with PYTHON=...)"

venv:
	@bash scripts/setup.sh

quickstart: venv
	$(PYTHON_IN_VENV) -m jaxdistill.train --config configs/quickstart.yaml $(ARGS)

test: venv
	$(PYTHON_IN_VENV) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: venv
	@! git grep -nE '^(<{7}|>{7}) ' || { echo 'a merge was not finished in the lines above'; exit 1; }
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright
	.venv/bin/lint-imports
	.venv/bin/shellcheck --external-sources $$(git ls-files '*.sh' '*.sbatch' .ci/run)

# Made anew each time: a page that is gone must not live on in the site. -W: a warning is an error.
docs: venv
	rm -rf site
	JAX_PLATFORMS=cpu .venv/bin/python -m sphinx -W --keep-going -q -E -b html -d site/.doctrees docs site
	rm -rf site/.doctrees
