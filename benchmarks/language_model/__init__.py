"""Pre-training a character model: low-rank rules against dense ones, tuned by one search."""
