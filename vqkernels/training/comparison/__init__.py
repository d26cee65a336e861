"""`vqkernels compare`: VQ-VAE and VAE side by side on one data set, at equal budget, seeds and sizes."""
