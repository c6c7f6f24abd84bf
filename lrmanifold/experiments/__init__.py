"""What the demo, the command line and the benchmarks train, and how.

:mod:`~lrmanifold.experiments.data` reads data sets from local files (nothing is downloaded),
:mod:`~lrmanifold.experiments.models` builds ordinary dense networks,
:mod:`~lrmanifold.experiments.methods` trains them, low-rank or not, by
:mod:`~lrmanifold.experiments.training`'s one loop, :mod:`~lrmanifold.experiments.factors` is the
plain low-rank layer to compare with, :mod:`~lrmanifold.experiments.runs` writes and reads a run's
files, and :mod:`~lrmanifold.experiments.demo` is the comparison on digits.
"""
