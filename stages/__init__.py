"""One module a stage; run one with ``python -m stages.NAME [BLOCK]``."""
