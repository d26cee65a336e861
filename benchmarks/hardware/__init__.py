"""Everything to be learned from a few minutes on a GPU, in one command: see __main__.py."""
