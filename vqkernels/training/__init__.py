"""Training of the full model: data, checkpoints, evaluation and the loop. Needs the extra `vqkernels[train]`."""
