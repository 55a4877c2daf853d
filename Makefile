# make reproduce   the demo on a fresh machine: environment, every stage, results/demo/report.html, the table of methods
# make test        everything that CI runs: linters, then the whole test suite
# make lint        the linters alone
# make clean       remove the demo's data and results

PYTHON ?= $(firstword $(foreach name,python3.12 python3.11 python3,$(shell command -v $(name))))
VENV := .venv
INSTALLED := $(VENV)/installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: reproduce test lint clean

reproduce: $(INSTALLED)
	snakemake --cores all
	@echo && cat results/demo/logs/report.log && echo "The pictures: results/demo/report.html"

test: lint
	python -m pytest

lint: $(INSTALLED)
	ruff check
	ruff format --check
	mypy
	snakefmt --check Snakefile rules
	snakemake --lint

clean:
	rm -rf data/demo results/demo metrics.json .snakemake

$(INSTALLED): requirements.txt
	$(PYTHON) -m venv $(VENV)
	python -m pip install --requirement requirements.txt
	touch $@
