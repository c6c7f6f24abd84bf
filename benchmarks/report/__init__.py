"""One page, HTML and Markdown, from the table that :mod:`benchmarks.robustness` fills.

``python -m benchmarks.report`` reads ``benchmarks/results/robustness/runs.jsonl`` and writes
``report.html`` (pictures inside), ``report.md`` and ``figures/`` beside it. Nothing is trained.
"""
