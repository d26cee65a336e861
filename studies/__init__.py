"""Finished experiments: each a script, run once, with its results in studies/results."""
