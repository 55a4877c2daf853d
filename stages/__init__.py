"""One module a stage; run one with ``python -m stages.NAME [BLOCK]``."""

import ctypes
import os
import sys

from pipeline import interrupts

# True while ``python -m stages.NAME`` imports this package, which is before it loads torch for seconds.
if sys.argv[0] == "-m":
    interrupts.listen()

# Read when torch loads its OpenMP. By default a thread spins at a barrier until the others come, which on two busy
# cores made a training step seven times slower; sleeping at once cost a factor of two. A short spin costs neither.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# glibc hands every tensor of more than 128 kB back to the kernel, which blanks its pages when the next one asks for
# them: a quarter of a training step. Kept instead, up to the 32 MB that glibc allows, they cost a tenth more memory.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
if sys.platform == "linux" and hasattr(_libc := ctypes.CDLL(None), "mallopt"):
    _libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    _libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
