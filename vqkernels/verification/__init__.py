"""Tests of the kernels on a user's machine: the contract suite, hostile inputs, and a search for a wrong index."""
