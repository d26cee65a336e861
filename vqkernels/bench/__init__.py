"""`vqkernels bench`: speed, memory and error of this package beside its peers, on the machine it runs on."""
