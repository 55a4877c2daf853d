"""One module a stage; run one with ``python -m stages.NAME [BLOCK]``."""

import os

# Read when torch loads its OpenMP. Threads that spin at barriers while another job has their core made a training on
# two busy cores five times slower; sleeping ones did not.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
