"""Adapters of one frozen network on a new text, tuned by one search, equal ranks."""
