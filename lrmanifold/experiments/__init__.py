"""Data and models of the experiments: what the demo, the command line and the benchmarks train.

:mod:`~lrmanifold.experiments.data` reads data sets from local files (nothing is downloaded),
:mod:`~lrmanifold.experiments.models` builds ordinary dense networks; ``factorize`` makes them
low-rank.
"""
