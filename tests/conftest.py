"""What all tests share: a single arithmetic thread in each process, since pytest-xdist starts a process per core."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when it is imported
