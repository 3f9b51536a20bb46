"""Workloads, baselines and measurements: ``pytest benchmarks/ --benchmark-only``."""
