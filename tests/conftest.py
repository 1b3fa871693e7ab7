"""Applies to every test, and to the processes that tests start."""

import os

# Matrices this small gain nothing from threads, and on busy cores waiting for them takes ten times as long.
# Torch reads this when it is imported, which comes later.
os.environ.setdefault("OMP_NUM_THREADS", "1")
