"""Clean and robust accuracy of many training methods, by plans that are written before the runs.

``python -m benchmarks.robustness NAME`` works on ``benchmarks/results/robustness/NAME/plan.toml``.
Every trial of a setting is a line of ``trials.jsonl`` beside it, every network measured on the test
images a line of ``runs.jsonl``; :mod:`benchmarks.report` makes the page. Training is that of
:mod:`lrmanifold.experiments`, and a run that is cut off goes on when it is called again.
"""
