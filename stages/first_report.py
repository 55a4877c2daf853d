"""Collect the scores of the rows that run first, before the other rows are done."""

from pipeline.workflow.stage import run
from stages.report import main

if __name__ == "__main__":
    run("first_report", main)
