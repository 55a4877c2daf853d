"""The programs of the stages, one module each. Run one with ``python -m stages.NAME [BLOCK]``."""

import ctypes
import os
import sys

from pipeline import interrupts

# True while ``python -m stages.NAME`` imports this package, seconds before torch is loaded.
if sys.argv[0] == "-m":
    interrupts.listen()

# OpenMP reads this when torch loads it. By default, a thread spins at a barrier until the others arrive, which made a
# training step seven times slower on two busy cores. Sleeping immediately made it twice as slow. A short spin costs
# neither.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# By default, glibc returns the memory of every tensor above 128 kB to the kernel, which zeroes its pages when they are
# allocated again. This took a quarter of a training step. Raising the limit to 32 MB, glibc's maximum, costs a tenth
# more memory.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
if sys.platform == "linux" and hasattr(_libc := ctypes.CDLL(None), "mallopt"):
    _libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    _libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
