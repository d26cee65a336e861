"""Who computes: the kernels of each device, the fallback, and the registry that chooses among them."""
