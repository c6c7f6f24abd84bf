"""Clean and robust accuracy of many training methods, by declarative experiments.

``python -m benchmarks.robustness`` runs the TOML files of ``configs/``; every finished run is one
line of ``benchmarks/results/robustness/runs.jsonl``, from which :mod:`benchmarks.report` makes a
page. A run that is cut off goes on after its last whole epoch (or measure) when it is called again.
"""
