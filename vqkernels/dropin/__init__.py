"""Drop-in quantizers: one file or folder per peer library, and `swap`, which puts them into a finished model."""
