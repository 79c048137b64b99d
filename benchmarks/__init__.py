"""Measurements from a checkout: ``python -m benchmarks --help``."""
