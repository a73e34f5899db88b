"""Benchmarks: one module per question, listed in README.md."""
