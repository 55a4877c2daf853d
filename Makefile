# make install     install the tested versions of all packages, and the command wsss, in .venv
# make reproduce   install the environment, run the demo, print the table of its rows; the report is results/demo/report.html
#                  (that on the first rows, which are done much earlier, is results/demo/first/report.html)
# make test        run everything that CI runs: linters, then the whole test suite
# make lint        run the linters
# make audit       report known vulnerabilities of the installed packages; never fails
# make clean       remove the demo's data and results

# The first Python that runs: a name on the PATH may be a version manager's placeholder.
SUITS := import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for name in python3.11 python3.12 python3; do \
	$$name -c "$(SUITS)" 2>/dev/null && echo $$name && break; done)
VENV := .venv
INSTALLED := $(VENV)/installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: install reproduce test lint audit clean

install: $(INSTALLED)

reproduce: $(INSTALLED)
	python -m pipeline.workflow.reproduce
	@echo && cat results/demo/logs/report.log && echo "Report with pictures: results/demo/report.html"

test: lint audit
	python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	ruff check
	ruff format --check
	mypy
	snakefmt --check Snakefile
	snakemake --lint

audit: $(INSTALLED)
	-@python .ci/audit.py

clean:
	rm -rf data/demo data/.lock-demo results/demo results/.hashes* metrics.json .lock-metrics.json .snakemake

$(INSTALLED): requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 with venv on the PATH; install one or set PYTHON"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	python -m pip install --requirement requirements.txt
	python -m pip install --no-deps --editable .
	touch $@
