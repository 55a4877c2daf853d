"""One module a stage; run one with ``python -m stages.NAME [BLOCK]``."""

import os

# Read when torch loads its OpenMP. By default a thread spins at a barrier until the others come, which on two busy
# cores made a training step seven times slower; sleeping at once cost a factor of two. A short spin costs neither.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
