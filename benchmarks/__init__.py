"""Measurements of this repository: run each as `python -m benchmarks.NAME`."""
