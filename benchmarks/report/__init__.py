"""``python -m benchmarks.report``: pages from the tables of :mod:`benchmarks.robustness`."""
