"""Drop-in quantizers: one file per peer library, and `swap`, which puts them into a finished model."""
